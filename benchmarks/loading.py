"""Peak RAM of loading: the final size, three times the largest tensor, and one gigabyte is the bar.

Writes a toy checkpoint of several gigabytes (full width, few blocks) and loads it in a fresh process in the precision
asked for: `python -m benchmarks.loading`. What counts is anonymous memory (RssAnon): the mapped file is the system's.
`python -m benchmarks.loading --t5` does the same for a toy T5 of 0.5 GB, resident and layer by layer, with
captions going through it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
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
    begun = time.perf_counter()
    with watched() as memory:
        model = load_transformer(file, dtype=torch.bfloat16, residence=Residence(precision, blocks_to_swap=blocks))
    seconds = time.perf_counter() - begun
    stored = sum(linear.storage.num_bytes for linear in model.linears().values() if linear.storage is not None)
    slots = sum(slot.buffer.nbytes for slot in model.runner.streamer.slots) if model.runner.streamer else 0
    final = stored + slots + sum(parameter.nbytes for parameter in model.parameters())
    largest = max(info.end - info.begin for info in file.reader.reader.reader.headers[path].tensors.values())
    peak = memory.peak - memory.before
    return Loaded(precision, streamed, path.stat().st_size / GB, final / GB, largest / GB, peak, seconds)


@dataclass(frozen=True)
class EncodedBy:
    """GB: a T5's file, and the anonymous memory after loading and at the peak of encoding captions on the CPU."""

    layerwise: bool
    captions: int
    file_gb: float
    hidden_gb: float
    loaded_gb: float
    peak_gb: float


def write_t5(path: Path, width: int, layers: int) -> None:
    """A T5 encoder's single file in bf16 with random weights and FLUX's vocabulary."""
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=5 * width // 2, num_layers=layers, num_heads=width // 64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    state = T5EncoderModel(config).to(torch.bfloat16).state_dict()
    del state["encoder.embed_tokens.weight"]
    save_file(state, path)


def encode_here(path: Path, layerwise: bool, captions: int, length: int = 128) -> EncodedBy:
    """Load a T5 in this process and send captions of `length` random ids through it, watching its memory."""
    import torch
    from transformers import T5EncoderModel  # noqa: F401 - imported before memory is counted

    from library.models import layerwise as by_layer
    from library.models import text
    from library.models.single_files import component_file

    torch.set_num_threads(1)
    reader, config = component_file("t5xxl", path)
    load = by_layer.load_t5 if layerwise else text.load_t5
    with watched() as memory:
        model = load(reader, config, "cpu", torch.bfloat16)
        loaded = anonymous_gb() - memory.before
        with torch.no_grad():
            hidden = model(torch.randint(0, 32000, (captions, length))).last_hidden_state
    size = path.stat().st_size / GB
    return EncodedBy(layerwise, captions, size, hidden.nbytes / GB, loaded, memory.peak - memory.before)


@dataclass
class Watched:
    """Anonymous memory in GB at the start, and its peak since."""

    before: float
    peak: float = 0.0


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Look at this process's memory every few milliseconds."""
    memory, done = Watched(anonymous_gb()), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            memory.peak = max(memory.peak, anonymous_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def answer_of(*words: str) -> dict:
    """What this script says in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", *words]
    root = Path(__file__).resolve().parent.parent
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(answer.stdout.splitlines()[-1])


def measure(path: Path, precision: str, streamed: bool) -> Loaded:
    """Load in a fresh process."""
    words = ["--load", str(path), "--precision", precision, *(["--streamed"] if streamed else [])]
    return Loaded(**answer_of(*words))


def measure_t5(path: Path, layerwise: bool, captions: int) -> EncodedBy:
    """Encode in a fresh process."""
    words = ["--t5", "--load", str(path), "--captions", str(captions), *(["--layerwise"] if layerwise else [])]
    return EncodedBy(**answer_of(*words))


def t5_table(width: int, layers: int) -> list[EncodedBy]:
    """A toy T5 either way, with few and with many captions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t5.safetensors"
        write_t5(path, width, layers)
        results = [measure_t5(path, layerwise, captions) for layerwise in (False, True) for captions in (1, 64)]
    for result in results:
        kind = "layer by layer" if result.layerwise else "resident"
        print(
            f"T5 {kind:14} file {result.file_gb:.2f} GB, loaded {result.loaded_gb:.2f}, peak {result.peak_gb:.2f} with"
            f" {result.captions} captions ({result.hidden_gb:.2f} GB of hidden states)"
        )
    return results


def main() -> None:
    """Write the toy, load it every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--t5", action="store_true")
    parser.add_argument("--layerwise", action="store_true")
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.load:
        found = (
            encode_here(given.load, given.layerwise, given.captions)
            if given.t5
            else load_here(given.load, given.precision, given.streamed)
        )
        print(json.dumps(asdict(found)))
        return
    results = t5_table(1536, 8) if given.t5 else table(given.hidden, given.double, given.single)
    if given.output:
        given.output.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if given.t5 or all(result.peak_gb <= result.bar_gb for result in results) else 1)


def table(hidden: int, double: int, single: int) -> list[Loaded]:
    """A toy transformer, loaded every way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.safetensors"
        write_checkpoint(path, hidden, double, single)
        ways = [("bf16", False), ("int8", False), ("int8", True), ("nf4", False)]
        results = [measure(path, *way) for way in ways]
    for result in results:
        kind = f"{result.precision}{' streamed' if result.streamed else ''}"
        print(
            f"{kind:14} file {result.file_gb:.2f} GB, loaded {result.final_gb:.2f}, peak {result.peak_gb:.2f}"
            f" (bar {result.bar_gb:.2f}), {result.seconds:.0f} s"
        )
    return results


if __name__ == "__main__":
    main()
