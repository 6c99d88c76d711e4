"""The targets, each of them met, missed or not measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.lowvram.arms import ARMS
from benchmarks.lowvram.report import Row

MET, MISSED, UNKNOWN = "met", "missed", "not measured"

RESERVED = (
    ("int8 streamed, checkpoints in RAM", 512, 2.4),
    ("int8 streamed, checkpoints in RAM", 1024, 3.2),
    ("nf4 modulation in RAM", 512, 6.7),
)
OVER_FLOOR = 1.10
OVER_RESIDENT, OVER_PCIE = 1.05, 1.10
MODEL_ERROR = 0.10
STREAMED = ("half streamed", "streamed", "streamed, checkpoints in RAM")
OURS = ("bf16 resident", "bf16 resident, compiled")
PEER = "diffusers+peft bf16, compiled"


@dataclass(frozen=True)
class Verdict:
    """One target. detail: the number that decides it, with the arm it comes from."""

    target: str
    verdict: str
    detail: str = ""


def judge(rows: list[Row]) -> list[Verdict]:
    """Every target, from whatever was measured."""
    return [
        *(_reserved(rows, *target) for target in RESERVED),
        _speed(rows),
        _floor(rows),
        _streaming(rows),
        _model(rows),
    ]


def _find(rows: Iterable[Row], arm: str, pixels: int) -> Row | None:
    return next((r for r in rows if r.measured.arm == arm and r.measured.pixels == pixels), None)


def _reserved(rows: list[Row], arm: str, pixels: int, limit: float) -> Verdict:
    target = f"{arm}: at most {limit:g} GB reserved at {pixels} px"
    found = _find(rows, arm, pixels)
    if found is None or found.measured.reserved_gb is None:
        return Verdict(target, UNKNOWN)
    reserved = found.measured.reserved_gb
    return Verdict(target, MET if reserved <= limit else MISSED, f"{reserved:.2f} GB")


def _speed(rows: list[Row]) -> Verdict:
    """Both of our ways count as the bf16 resident step; the detail has each of them."""
    target = "bf16 resident step at least as fast as diffusers + PEFT compiled"
    details, slower = [], False
    for peer in (r.measured for r in rows if r.measured.arm == PEER and r.floor_seconds is not None):
        ours = [found.measured for arm in OURS if (found := _find(rows, arm, peer.pixels))]
        if ours:
            slower |= min(one.seconds for one in ours) > peer.seconds
            times = ", ".join(f"{one.arm} {one.seconds:.3f} s" for one in ours)
            details.append(f"{peer.pixels} px: {times}, theirs {peer.seconds:.3f} s")
    return Verdict(target, (MISSED if slower else MET) if details else UNKNOWN, "; ".join(details))


def _floor(rows: list[Row]) -> Verdict:
    target = f"peak at most {OVER_FLOOR:.2f} x its floor"
    ratios = [(r.measured.allocated_gb / r.floor_vram, r) for r in rows if r.floor_vram and r.measured.allocated_gb]
    if not ratios:
        return Verdict(target, UNKNOWN)
    ratio, worst = max(ratios, key=lambda pair: pair[0])
    strict = max(r.measured.allocated_gb / r.floor_counted for _, r in ratios)
    reserved = max(r.measured.reserved_gb / r.floor_vram for _, r in ratios)
    detail = (
        f"at worst {ratio:.2f} x ({_name(worst)}) over {len(ratios)}; reserved {reserved:.2f} x;"
        f" {strict:.2f} x the floor with InFlux's own counted activations"
    )
    return Verdict(target, MET if ratio <= OVER_FLOOR else MISSED, detail)


def _streaming(rows: list[Row]) -> Verdict:
    """Pageable memory is measured beside it, and not judged: its bandwidth is not PCIe's."""
    target = f"streamed step at most max({OVER_RESIDENT:.2f} x resident, {OVER_PCIE:.2f} x PCIe time)"
    ratios = []
    for streamed in rows:
        arm = ARMS[streamed.measured.arm]
        precision, _, way = arm.name.partition(" ")
        if arm.peer or way not in STREAMED or streamed.pcie_seconds is None:
            continue
        resident = _find(rows, f"{precision} resident", streamed.measured.pixels)
        allowed = max(
            OVER_RESIDENT * resident.measured.seconds if resident else 0.0, OVER_PCIE * streamed.pcie_seconds
        )  # fmt: skip
        if resident is not None or streamed.measured.seconds <= allowed:
            ratios.append((streamed.measured.seconds / allowed, streamed))
    if not ratios:
        return Verdict(target, UNKNOWN)
    ratio, worst = max(ratios, key=lambda pair: pair[0])
    detail = f"at worst {ratio:.2f} of what is allowed ({_name(worst)}) over {len(ratios)}"
    return Verdict(target, MET if ratio <= 1 else MISSED, detail)


def _model(rows: list[Row]) -> Verdict:
    target = f"memory model within {MODEL_ERROR:.0%} of max_memory_allocated"
    errors = [
        (r.forecast_allocated / r.measured.allocated_gb - 1, r)
        for r in rows
        if r.forecast_allocated and r.measured.allocated_gb
    ]
    if not errors:
        return Verdict(target, UNKNOWN)
    low, high = (choose(errors, key=lambda pair: pair[0]) for choose in (min, max))
    detail = f"{low[0]:+.1%} ({_name(low[1])}) to {high[0]:+.1%} ({_name(high[1])}) over {len(errors)}"
    return Verdict(target, MET if max(abs(low[0]), abs(high[0])) <= MODEL_ERROR else MISSED, detail)


def _name(row: Row) -> str:
    return f"{row.measured.arm}, {row.measured.pixels} px"
