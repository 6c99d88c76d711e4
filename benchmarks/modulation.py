"""What `modulation_on_cpu` costs per step: one vector per sample times 3.2 billion weights in RAM.

    python -m benchmarks.modulation --output benchmarks/results/modulation.json

Times linears of the real sizes in every stored precision and scales up to the 57 blocks. Beside it, as the
yardstick, the same product over weights that are decoded whole first. The arms alternate; each keeps its best round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.linear import Linear
from library.memory.precision import PLAIN_DTYPES, QUANTISED, STORAGES, make_storage
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape
from library.networks.parts import is_modulation

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Pass:
    """One pass through all modulation linears: CPU-seconds of all threads, and wall seconds (on a busy machine)."""

    precision: str
    dtype: str
    batch: int
    threads: int
    cpu_seconds: float
    wall_seconds: float
    decoded_first_cpu_seconds: float


def modulation_shapes(shape: FluxShape) -> list[tuple[int, int]]:
    """(out, in) of every modulation linear of the blocks."""
    return [size for path, size in linear_shapes(shape).items() if is_modulation(path)]


def some_linears(sizes: list[tuple[int, int]], precision: str, count: int) -> list[Linear]:
    """A few linears of each size, with random weights."""
    found = []
    for out, width in sorted(set(sizes)):
        for seed in range(count):
            weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.02
            linear = Linear(width, out, device="meta")
            linear.bias = torch.nn.Parameter(torch.zeros(out), requires_grad=False)
            if precision in QUANTISED:
                kind = STORAGES[precision]
                encoded = kind.encode(weight, kind.layout((out, width), torch.bfloat16))
                linear.set_storage(make_storage(precision, (out, width), encoded))
            else:
                linear.weight = torch.nn.Parameter(weight.to(PLAIN_DTYPES[precision]), requires_grad=False)
            found.append(linear)
    return found


def decoded_first(linear: Linear, x: Tensor) -> Tensor:
    """The layer over its whole weight in the activations' dtype."""
    return F.linear(x, linear.dequantized(x.dtype), linear.bias.to(x.dtype))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU, wall) seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


@torch.no_grad()
def measure(linears: list[Linear], precision: str, dtype: str, batch: int, weights: int, rounds: int) -> Pass:
    """One pass over `weights` weights, from these linears."""
    x = torch.randn(batch, linears[0].in_features).to(DTYPES[dtype])
    scale = weights / sum(linear.in_features * linear.out_features for linear in linears)
    ours, whole = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: [linear(x) for linear in linears]))
        whole.append(seconds(lambda: [decoded_first(linear, x) for linear in linears]))
    cpu, wall = (min(times) * scale for times in zip(*ours))
    other = min(cpu for cpu, _ in whole) * scale
    return Pass(precision, dtype, batch, torch.get_num_threads(), round(cpu, 3), round(wall, 3), round(other, 3))


def line(one: Pass) -> str:
    """A measurement in words."""
    return (
        f"{one.precision:5} in {one.dtype}, batch {one.batch}, {one.threads} thread(s): {one.cpu_seconds:6.2f} CPU-s"
        f" ({one.wall_seconds:.2f} s); decoded whole first: {one.decoded_first_cpu_seconds:.2f} CPU-s"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--count", type=int, default=4, help="linears of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sizes = modulation_shapes(FluxShape(hidden=given.hidden, heads=given.hidden // 128, mlp=4 * given.hidden))
    weights = sum(out * width for out, width in sizes)
    found = []
    for precision in ("bf16", *QUANTISED):
        torch.set_num_threads(1)
        linears = some_linears(sizes, precision, given.count)
        for dtype in DTYPES if precision in QUANTISED else (precision,):
            for threads, batch in itertools.product(given.threads, given.batches):
                torch.set_num_threads(threads)
                found.append(measure(linears, precision, dtype, batch, weights, given.rounds))
                print(line(found[-1]))
    if given.output:
        facts = {"weights": weights, "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
        text = json.dumps({**facts, "passes": [asdict(one) for one in found]}, indent=2)
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
