"""What torch_compile costs once: the first step of each kind against the steps after it, with inductor.

    python -m benchmarks.first_step [--output benchmarks/results/first_step.json]

A small FLUX (hidden 256, 2 + 4 blocks; a region's graph is the same at any width and depth) with a LoRA takes two steps
at each size, and makes one prediction without gradients, as a preview does. Inductor starts with an empty cache, in a
folder of its own; then all is repeated in a new process with the cache that is now there. Seconds are processor time,
those of the C++ compiler included, on one thread: on a machine with nothing else to do, the time one waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from library.config.tables.network import NetworkTable
from library.flow.packing import image_ids
from library.models.compiled import compile_elementwise
from library.models.flux import FluxTransformer
from library.models.shape import FluxShape, axes_for

SIZES = ((1, 256, 256), (1, 256, 320), (1, 320, 192), (2, 256, 256), (3, 192, 320), (4, 128, 128))
"""(batch, height, width) in the order of training."""
TEXT = 128


def make_model(checkpointing: bool) -> FluxTransformer:
    """A small FLUX with random weights and a LoRA on its blocks, compiled."""
    from library.networks import build

    torch.manual_seed(0)
    shape = FluxShape(
        hidden=256, heads=8, mlp=1024, double_blocks=2, single_blocks=4, text_width=128, pooled_width=128,
        axes_dim=axes_for(32),
    )  # fmt: skip
    model = FluxTransformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.runner.checkpointing = checkpointing
    build(NetworkTable(network_dim=4), model).attach()
    compile_elementwise(model.ops)
    return model


def inputs(model: FluxTransformer, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Random inputs of a size in pixels."""
    rows, columns = height // 8, width // 8
    return {
        "tokens": torch.randn(batch, rows * columns // 4, model.shape.in_channels),
        "text": torch.randn(batch, TEXT, model.shape.text_width),
        "pooled": torch.randn(batch, model.shape.pooled_width),
        "timestep": torch.rand(batch), "guidance": torch.ones(batch), "image_ids": image_ids(rows, columns),
    }  # fmt: skip


def measure(checkpointing: bool) -> list[dict]:
    """For every size: seconds of its first step and of a later one, and what the first one took longer."""
    model, rows = make_model(checkpointing), []
    for batch, height, width in SIZES:
        given = inputs(model, batch, height, width)
        first, *later = [_seconds(lambda given=given: model(**given).square().mean().backward()) for _ in range(4)]
        usual = statistics.median(later)
        rows.append({"what": f"step, {batch} x {height} x {width}", "first": first, "later": usual})
    with torch.no_grad():
        first, later = (_seconds(lambda: model(**given)) for _ in range(2))
    rows.append({"what": "prediction without gradients", "first": first, "later": later})
    return [{**row, "beyond": row["first"] - row["later"]} for row in rows]


def _seconds(work) -> float:
    begun = _processor_time()
    work()
    return _processor_time() - begun


def _processor_time() -> float:
    """Seconds of this process and of the compilers it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def in_new_process(checkpointing: bool, cache: str) -> list[dict]:
    """`measure` in a process of its own, with inductor's cache in this folder."""
    command = [sys.executable, "-m", "benchmarks.first_step", "--measure", str(int(checkpointing))]
    one = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **one}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_name() -> str:
    """The CPU as the system calls it."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, one thread used"


def run() -> dict:
    """With and without checkpointing, each with an empty cache and with a filled one."""
    record: dict = {"cpu": cpu_name(), "torch": torch.__version__, "backend": "inductor (C++)", "gpu": "not measured"}
    for name, checkpointing in (("checkpointing", True), ("no checkpointing", False)):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty cache", "filled cache"):
                record[f"{name}, {state}"] = in_new_process(checkpointing, cache)
    return record


def table(record: dict) -> str:
    """Seconds beyond a later step, as lines of text."""
    lines = [record["cpu"]]
    for name, rows in record.items():
        if isinstance(rows, list):
            lines.append(name)
            lines += [f"  {row['what']:32} {row['beyond']:7.2f} s beyond {row['later']:.2f} s" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure is not None:
        print(json.dumps(measure(bool(given.measure))))
        return
    record = run()
    print(table(record))
    if given.output:
        given.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
