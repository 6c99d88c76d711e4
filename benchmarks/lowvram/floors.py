"""What a training step must at least hold and take: the floors that measurements are held against.

Memory (bytes on the device, without the CUDA context), one sample, LoRA on all linears:

    resident weights + ring + network + activations

  resident weights  everything that is neither streamed nor kept in RAM, in its precision
  ring              two slots of the largest streamed block
  network           6 p: bf16 weights, bf16 gradients and the 8-bit AdamW state of p trained parameters
  activations       A(T), less 57 checkpoints of 2 h T bytes where they are offloaded

T counts text and image tokens. A is linear in T; two choices of it exist. `PUBLISHED` is the peak that plain
per-block checkpointing of diffusers' blocks needs (1.09 GB at 1536 tokens, 2.63 GB at 4608; one dequantised weight
included): the floor that the targets speak of. `counted` is InFlux's own peak on fake tensors
(benchmarks/results/counters_*.json), which is lower: the distance to it says what is left to gain.

Time: the slower of arithmetic at the card's measured peak and of copies at its measured bandwidth.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from library.memory.precision import QUANTISED
from library.models import cost
from library.models.cost import GB, Setting, Work
from library.models.shape import FluxShape

RESULTS = Path(__file__).resolve().parent.parent / "results"
Line = tuple[tuple[int, float], tuple[int, float]]
"""Two points (tokens, GB)."""
PUBLISHED: Line = ((1536, 1.09), (4608, 2.63))
NETWORK_BYTES = 6.0


@lru_cache(maxsize=1)
def counted() -> Line:
    """InFlux's own peaks at 512 and 1024 px with 512 text tokens."""
    points = []
    for pixels in (512, 1024):
        record = json.loads((RESULTS / f"counters_{pixels}.json").read_text(encoding="utf-8"))
        points.append((512 + (pixels // 16) ** 2, record["arms"]["influx"]["peak_gb"]))
    return points[0], points[1]


def on_line(line: Line, tokens: int) -> float:
    """The line's GB at a number of tokens."""
    (first, low), (second, high) = line
    return low + (high - low) * (tokens - first) / (second - first)


def vram(shape: FluxShape, setting: Setting, work: Work, line: Line = PUBLISHED) -> float:
    """The floor on peak memory in GB. `line` is that of FLUX.1's own depth and width: for other shapes, nonsense."""
    base = cost.weights(shape, setting)
    swapped = cost.swapped_blocks(shape, setting.blocks_to_swap) if setting.blocks_to_swap else []
    resident = base.total - sum(base.blocks[index] for index in swapped)
    if setting.modulation_on_cpu:
        resident -= base.modulation
    ring = min(2, len(swapped)) * max((base.blocks[index] for index in swapped), default=0.0)
    checkpoint = 2.0 * shape.hidden * work.tokens * (shape.double_blocks + shape.single_blocks)
    activations = on_line(line, work.tokens) - (checkpoint / GB if setting.offload else 0.0)
    if line is not PUBLISHED and setting.precision in QUANTISED:
        activations += 2.0 * base.largest_linear / GB
    return (resident + ring + NETWORK_BYTES * work.trained) / GB + activations


def seconds(shape: FluxShape, setting: Setting, work: Work, tflops: float, gbs: float) -> float:
    """The floor on a step's time with a peak of `tflops` and `gbs` from host to device."""
    compute = cost.step_flops(shape, setting, work) / (tflops * 1e12)
    return max(compute, cost.crossing_bytes(shape, setting, work) / (gbs * GB))
