"""One arm, in a process of its own: its peaks are its own, and its failure ends nothing else.

Called with a job as JSON and a file; each size's numbers are appended to the file as soon as they are known, so what
was measured before a failure is kept.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.lowvram.arms import ARMS, TOY, Arm
from library.models.cost import CUDA_CONTEXT, GB
from library.models.shape import FluxShape

WARM_UP = 2
FEWEST = 3
"""Steps that are timed even if they take longer than a size may."""

Step = Callable[[], float]
"""Takes one whole training step and returns its loss."""


@dataclass(frozen=True)
class Job:
    """What a child has to do. seconds: how long one size may be timed; deadline: when no new size is begun (epoch)."""

    arm: str
    pixels: tuple[int, ...]
    steps: int = 10
    seconds: float = 20.0
    text: int = 512
    toy: bool = False
    cap_gb: float | None = None
    deadline: float = math.inf

    @property
    def shape(self) -> FluxShape:
        """The model."""
        return TOY if self.toy else FluxShape()


@dataclass(frozen=True)
class Measured:
    """One arm at one size. GB are 1e9 bytes; None: not measurable on this device, or in this process.

    seconds: median of the timed steps, fastest and slowest beside it. rss_gb: the process's peak of RAM so far;
    pinned_gb: of page-locked memory (whether that is part of the former is up to the driver). pcie_gb: from host to
    device, per step. context_gb: what the card lacks beside torch's own memory.
    """

    arm: str
    pixels: int
    seconds: float
    fastest: float
    slowest: float
    timed: int
    loss: float
    trained: int
    allocated_gb: float | None = None
    reserved_gb: float | None = None
    context_gb: float | None = None
    rss_gb: float | None = None
    pinned_gb: float | None = None
    pcie_gb: float = 0.0


@dataclass
class Subject:
    """What an arm gives to be measured.

    at: a context in which a function takes one step at a size. crossed: bytes copied from host to device so far.
    """

    at: Callable[[int], AbstractContextManager[Step]]
    trained: int
    crossed: Callable[[], int] = lambda: 0


def device_here() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build(job: Job, arm: Arm, device: torch.device) -> Subject:
    """The model of an arm, on its device."""
    if arm.peer:
        from benchmarks.lowvram.peers import diffusers_peft

        return diffusers_peft(job, arm, device)
    from benchmarks.lowvram.trainer import influx

    return influx(job, arm, device)


def run(job: Job, alone: bool) -> Iterator[Measured]:
    """Every size of an arm, smallest first. alone: this process runs nothing else, so its peak of RAM is the arm's."""
    arm, device = ARMS[job.arm], device_here()
    if job.cap_gb is not None and device.type == "cuda":
        limit = (job.cap_gb * GB - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit), device)
    subject = build(job, arm, device)
    _forget(device)
    for pixels in sorted(job.pixels):
        if time.time() > job.deadline:
            return
        if arm.compiled:
            torch._dynamo.reset()  # each size is compiled for itself, at its best
        with subject.at(pixels) as step:
            yield _measure(job, subject, step, pixels, device, alone)
        _forget(device)


def _measure(job: Job, subject: Subject, step: Step, pixels: int, device: torch.device, alone: bool) -> Measured:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses = [step() for _ in range(WARM_UP)]
    before, times = subject.crossed(), []
    while len(times) < job.steps and (len(times) < FEWEST or sum(times) < job.seconds):
        _synchronise(device)
        begun = time.perf_counter()
        losses.append(step())
        _synchronise(device)
        times.append(time.perf_counter() - begun)
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"{job.arm} at {pixels} px: a loss is not finite: {losses}")
    crossed = (subject.crossed() - before) / len(times) / GB
    return Measured(
        job.arm, pixels, statistics.median(times), min(times), max(times), len(times), losses[-1], subject.trained,
        pcie_gb=crossed, **_device_memory(device), **(_host_memory(device) if alone else {}),
    )  # fmt: skip


def _device_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_gb": torch.cuda.max_memory_allocated(device) / GB,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / GB,
        # This process's context, and whatever else runs on the card.
        "context_gb": (total - free - torch.cuda.memory_reserved(device)) / GB,
    }


def _host_memory(device: torch.device) -> dict[str, float]:
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if device.type == "cuda" else 0
    return {"rss_gb": peak_ram() / GB, "pinned_gb": pinned / GB}


def peak_ram() -> int:
    """The most bytes of RAM this process has had. Linux's ru_maxrss would include the parent's from before exec."""
    status = _proc_status("VmHWM")
    if status is not None:
        return status
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def resident_ram() -> int:
    """Bytes of RAM this process has now."""
    status = _proc_status("VmRSS")
    if status is not None:
        return status
    import psutil

    return psutil.Process().memory_info().rss


def _proc_status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
    return None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    """Give memory back between sizes, so that each one's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """`child JOB FILE`: append the numbers of each size; for the job "ceilings", the card's."""
    asked, target = json.loads(sys.argv[1]), Path(sys.argv[2])
    if asked["arm"] == "ceilings":
        from benchmarks.lowvram.ceilings import measure

        target.write_text(json.dumps(asdict(measure(device_here()))) + "\n", encoding="utf-8")
        return
    asked["pixels"] = tuple(asked["pixels"])
    for measured in run(Job(**asked), alone=True):
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measured)) + "\n")


if __name__ == "__main__":
    main()
