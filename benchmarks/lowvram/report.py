"""The measurements beside what was to be expected, as Markdown and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from benchmarks.lowvram import floors
from benchmarks.lowvram.arms import ARMS, OPTIMIZER, RANK
from benchmarks.lowvram.ceilings import Ceilings
from benchmarks.lowvram.child import Measured
from library.models import cost
from library.models.cost import GB, REFERENCE_CARD, Work
from library.models.shape import FluxShape

OUTSIDE = ("allocator", "CUDA context")
"""Parts of the memory model that `max_memory_allocated` does not see."""


@dataclass(frozen=True)
class Row:
    """One arm at one size beside its floors and forecasts (GB, seconds); None: unknown, or not meant for this arm.

    ram: the process's peak, page-locked memory included. forecast_allocated, forecast_reserved: the memory model
    without allocator and context, and without the context.
    floor_counted: the floor with InFlux's own counted activations. pcie_seconds: the copies alone, at full speed.
    """

    measured: Measured
    ram: float | None = None
    forecast_ram: float | None = None
    forecast_allocated: float | None = None
    forecast_reserved: float | None = None
    forecast_seconds: float | None = None
    floor_vram: float | None = None
    floor_counted: float | None = None
    floor_seconds: float | None = None
    pcie_seconds: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """An arm (or one size of it) without numbers, and why."""

    arm: str
    pixels: tuple[int, ...]
    reason: str


def row(measured: Measured, ceilings: Ceilings, toy: bool, text: int) -> Row:
    """What follows from a measurement, the arm's setting and the card's ceilings."""
    ram = measured.rss_gb
    if ram is not None and not ceilings.pinned_is_resident:
        ram += measured.pinned_gb or 0.0
    if toy:
        return Row(measured, ram)
    shape, arm = FluxShape(), ARMS[measured.arm]
    setting = arm.setting(shape)
    work = Work(measured.trained, RANK, OPTIMIZER, 1, measured.pixels, measured.pixels, text)
    times = {}
    if ceilings.tflops and ceilings.pinned_gbs:
        card = replace(REFERENCE_CARD, name=ceilings.device, tflops=ceilings.tflops, pcie=ceilings.pinned_gbs)
        times = {
            "floor_seconds": floors.seconds(shape, setting, work, card.tflops, card.pcie),
            "pcie_seconds": (measured.pcie_gb or 0.0) / card.pcie,
        }
        if not arm.peer:
            times["forecast_seconds"] = cost.step_seconds(shape, setting, work, card)
    if arm.peer:
        return Row(measured, ram, **times)
    parts = cost.training_vram(shape, setting, work).parts
    allocated = sum(size for name, size in parts.items() if name not in OUTSIDE) / GB
    return Row(
        measured, ram, cost.training_ram(shape, setting, work).total / GB, allocated,
        allocated + parts.get("allocator", 0.0) / GB,
        floor_vram=floors.vram(shape, setting, work),
        floor_counted=floors.vram(shape, setting, work, floors.counted()), **times,
    )  # fmt: skip


COLUMNS = (
    "arm", "px", "s/step", "estimate", "floor", "VRAM allocated", "forecast", "floor", "reserved", "RAM", "forecast",
    "PCIe GB/step",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """The results as a Markdown table. Seconds, then GB (1e9 bytes)."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for r in rows:
        m = r.measured
        cells = [m.arm, str(m.pixels), *(_show(x, ".3f") for x in (m.seconds, r.forecast_seconds, r.floor_seconds))]
        numbers = (
            m.allocated_gb, r.forecast_allocated, r.floor_vram, m.reserved_gb, r.ram, r.forecast_ram, m.pcie_gb
        )  # fmt: skip
        lines.append(f"| {' | '.join([*cells, *(_show(x, '.2f') for x in numbers)])} |")
    return "\n".join(lines)


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def heading(about: dict[str, object], ceilings: Ceilings) -> str:
    """What was measured on, in a line or two."""
    line = f"{about['device']}, torch {about['torch']}, driver {about['driver']}, {about['host']}, {about['date']}"
    if about["cap_gb"]:
        line += f", held to {about['cap_gb']:g} GB"
    if ceilings.tflops is None:
        return f"{line}. No card: nothing of its memory or speed was measured."
    return (
        f"{line}. At best: {ceilings.tflops:.0f} TFLOP/s in bf16, from host to device {ceilings.pinned_gbs:.1f} GB/s"
        f" pinned and {ceilings.pageable_gbs:.1f} GB/s pageable. FLUX.1 Fill's shape with random weights, batch 1,"
        f" rank {RANK} on all linears of the blocks, {OPTIMIZER}, checkpointing everywhere."
    )


def markdown(about: dict[str, object], ceilings: Ceilings, rows: list[Row], verdicts: list, left: list[LeftOut]) -> str:
    """Everything a reader wants, for the README and docs/memory.md."""
    parts = [heading(about, ceilings), table(rows)]
    if verdicts:
        lines = ["| target | verdict | measured |", "|---|---|---|"]
        lines += [f"| {v.target} | {v.verdict} | {v.detail or '-'} |" for v in verdicts]
        parts.append("\n".join(lines))
    if left:
        lines = ["Without numbers:", ""]
        lines += [f"- {one.arm}, {', '.join(map(str, one.pixels))} px: {one.reason}" for one in left]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def record(
    about: dict[str, object], ceilings: Ceilings, rows: list[Row], verdicts: list, left: list[LeftOut]
) -> dict[str, object]:
    """The same for a machine."""
    flat = [asdict(one.measured) | {k: v for k, v in asdict(one).items() if k != "measured"} for one in rows]
    return {
        **about, "ceilings": asdict(ceilings), "results": flat, "verdicts": [asdict(v) for v in verdicts],
        "left_out": [asdict(one) for one in left],
    }  # fmt: skip
