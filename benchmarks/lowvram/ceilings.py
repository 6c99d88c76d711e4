"""What the card can do at best: matrix products, and copies between host and device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.lowvram.child import resident_ram
from library.models.cost import GB

SIDE = 8192
COPIED = 1 << 29
REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """The device and its best figures; None where there is no card to measure.

    tflops: bf16 products of 8192 x 8192 matrices. pinned_gbs, pageable_gbs: host to device; back_gbs: to pinned host.
    pinned_is_resident: whether the driver lets page-locked memory count as part of a process's resident memory.
    """

    device: str
    torch: str
    kind: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    cuda: str | None = None
    memory_gb: float | None = None
    tflops: float | None = None
    pinned_gbs: float | None = None
    pageable_gbs: float | None = None
    back_gbs: float | None = None
    pinned_is_resident: bool = True


def measure(device: torch.device) -> Ceilings:
    """Take about three seconds to find out."""
    if device.type != "cuda":
        return Ceilings("cpu", torch.__version__)
    about = torch.cuda.get_device_properties(device)
    on_device = torch.empty(COPIED, dtype=torch.uint8, device=device)
    before = resident_ram()
    pinned = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True).fill_(1)
    grown = resident_ram() - before
    pageable = torch.ones(COPIED, dtype=torch.uint8)
    speed = lambda copy: COPIED / fastest(copy, device) / GB
    return Ceilings(
        about.name, torch.__version__, "cuda", (about.major, about.minor), torch.version.cuda,
        about.total_memory / GB,
        tflops=products(device),
        pinned_gbs=speed(lambda: on_device.copy_(pinned, non_blocking=True)),
        pageable_gbs=speed(lambda: on_device.copy_(pageable)),
        back_gbs=speed(lambda: pinned.copy_(on_device, non_blocking=True)),
        pinned_is_resident=grown > COPIED // 2,
    )  # fmt: skip


def products(device: torch.device, side: int = SIDE) -> float:
    """TFLOP/s of a product of two square bf16 matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(left)
    return 2.0 * side**3 / fastest(lambda: torch.mm(left, right, out=result), device) / 1e12


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, after three to warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)
