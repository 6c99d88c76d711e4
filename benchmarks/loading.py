"""Peak RAM of loading: the final size, three times the largest tensor, and one gigabyte is the bar.

Writes a toy checkpoint of several gigabytes (full width, few blocks) and loads it in a fresh process in the precision
asked for: `python -m benchmarks.loading`. What counts is anonymous memory (RssAnon): the mapped file is the system's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

GB = 1e9
ALLOWANCE = 1.0
"""GB on top, for Python and torch themselves."""


@dataclass(frozen=True)
class Loaded:
    """GB: the file, the loaded weights, the largest tensor, and the peak of anonymous memory beyond torch's own."""

    precision: str
    streamed: bool
    file_gb: float
    final_gb: float
    largest_gb: float
    peak_gb: float
    seconds: float

    @property
    def bar_gb(self) -> float:
        """What the peak may be."""
        return self.final_gb + 3 * self.largest_gb + ALLOWANCE


def write_checkpoint(path: Path, hidden: int, double: int, single: int) -> None:
    """A BFL single file in bf16 with random values."""
    import torch
    from safetensors.torch import save_file

    from library.models.keymap import entries
    from library.models.shape import FluxShape

    shape = FluxShape(
        hidden=hidden, heads=hidden // 128, mlp=4 * hidden, double_blocks=double, single_blocks=single
    )  # fmt: skip
    random = torch.randn(1 << 20).to(torch.bfloat16)
    tensors = {}
    for entry in entries(shape):
        count = 1
        for side in entry.shape:
            count *= side
        tensors[entry.name] = random.repeat(-(-count // len(random)))[:count].view(entry.shape)
    save_file(tensors, path)


def anonymous_gb() -> float:
    """RssAnon of this process (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / GB
    raise RuntimeError("this system does not tell RssAnon")


def load_here(path: Path, precision: str, streamed: bool) -> Loaded:
    """Load in this process, watching its memory."""
    import torch

    from library.models.checkpoint_file import TransformerFile
    from library.models.load import Residence, load_transformer

    torch.set_num_threads(1)
    file = TransformerFile.open(path)
    blocks = file.shape.double_blocks + file.shape.single_blocks if streamed else 0
    before, peak, done = anonymous_gb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    model = load_transformer(file, dtype=torch.bfloat16, residence=Residence(precision, blocks_to_swap=blocks))
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    stored = sum(linear.storage.num_bytes for linear in model.linears().values() if linear.storage is not None)
    slots = sum(slot.buffer.nbytes for slot in model.runner.streamer.slots) if model.runner.streamer else 0
    final = stored + slots + sum(parameter.nbytes for parameter in model.parameters())
    largest = max(info.end - info.begin for info in file.reader.reader.reader.headers[path].tensors.values())
    return Loaded(precision, streamed, path.stat().st_size / GB, final / GB, largest / GB, peak[0] - before, seconds)


def measure(path: Path, precision: str, streamed: bool) -> Loaded:
    """Load in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--load", str(path), "--precision", precision]
    answer = subprocess.run(
        [*command, *(["--streamed"] if streamed else [])], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    return Loaded(**json.loads(answer.stdout.splitlines()[-1]))


def main() -> None:
    """Write the toy, load it every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(asdict(load_here(given.load, given.precision, given.streamed))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.safetensors"
        write_checkpoint(path, given.hidden, given.double, given.single)
        ways = [("bf16", False), ("int8", False), ("int8", True), ("nf4", False)]
        results = [measure(path, *way) for way in ways]
    for result in results:
        kind = f"{result.precision}{' streamed' if result.streamed else ''}"
        print(
            f"{kind:14} file {result.file_gb:.2f} GB, loaded {result.final_gb:.2f}, peak {result.peak_gb:.2f}"
            f" (bar {result.bar_gb:.2f}), {result.seconds:.0f} s"
        )
    if given.output:
        given.output.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(result.peak_gb <= result.bar_gb for result in results) else 1)


if __name__ == "__main__":
    main()
