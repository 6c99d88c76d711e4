"""The arms one after the other, within the time; what one of them meets ends none of the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.lowvram.arms import ARMS
from benchmarks.lowvram.ceilings import Ceilings
from benchmarks.lowvram.child import Job, Measured
from benchmarks.lowvram.child import run as run_here
from benchmarks.lowvram.report import LeftOut, Row, row
from library.memory import allocator

ROOT = Path(__file__).resolve().parents[2]
HANG = 300.0
"""Seconds an arm may run beyond the end of the time before it is taken for stuck."""


@dataclass
class Outcome:
    """What came of it."""

    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def measure(
    arms: list[str], job: Job, minutes: float, alone: bool = True, report: Callable[[Outcome], None] | None = None
) -> Outcome:
    """Every arm at every size of `job`, in order. alone: each in a process of its own. report: called after each."""
    end = time.time() + 60 * minutes
    ceilings = ceilings_alone() if alone else ceilings_here()
    outcome = Outcome(ceilings)
    for name in arms:
        asked = replace(job, arm=name, deadline=end)
        missing = ARMS[name].missing(ceilings.kind, ceilings.capability)
        late = time.time() > end
        if missing is not None or late:
            outcome.left_out.append(LeftOut(name, job.pixels, missing or "the time was used up"))
            continue
        measured, reason = run_alone(asked) if alone else (list(run_here(asked, alone=False)), None)
        outcome.rows += [row(one, ceilings, job.toy, job.text) for one in measured]
        without = tuple(sorted({*job.pixels} - {one.pixels for one in measured}))
        if without:
            outcome.left_out.append(LeftOut(name, without, reason or "the time was used up"))
        if report is not None:
            report(outcome)
    return outcome


def ceilings_here() -> Ceilings:
    """The device's best figures, measured in this process."""
    from benchmarks.lowvram.ceilings import measure
    from benchmarks.lowvram.child import device_here

    return measure(device_here())


def ceilings_alone() -> Ceilings:
    """The device's best figures. Measured in a process of its own: a context here would take memory from the arms."""
    lines, reason = call({"arm": "ceilings"}, HANG)
    if not lines:
        raise RuntimeError(f"the card's ceilings could not be measured: {reason}")
    return Ceilings(**(lines[0] | {"capability": tuple(lines[0]["capability"])}))


def run_alone(job: Job) -> tuple[list[Measured], str | None]:
    """One arm in a process of its own: its numbers, and why some of them are missing."""
    lines, reason = call(asdict(job), job.deadline - time.time() + HANG)
    return [Measured(**line) for line in lines], reason


def call(job: dict[str, object], patience: float) -> tuple[list[dict], str | None]:
    """Run the child on a job; the lines it wrote, and what went wrong if something did."""
    with tempfile.TemporaryDirectory() as folder:
        target, errors = Path(folder) / "numbers", Path(folder) / "errors"
        command = [sys.executable, "-m", "benchmarks.lowvram.child", json.dumps(job), str(target)]
        reason = None
        try:
            with errors.open("wb") as stderr:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr, timeout=patience,
                    check=False,
                )  # fmt: skip
            if done.returncode:
                reason = explanation(done.returncode, errors.read_text(encoding="utf-8", errors="replace"))
        except subprocess.TimeoutExpired:
            reason = f"stuck: stopped after {patience:.0f} s"
        lines = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    return [json.loads(line) for line in lines], reason


def environment() -> dict[str, str]:
    """This process's environment with the allocator's settings, which have to be there before torch is imported."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    allocator.configure(variables)
    return variables


def explanation(code: int, errors: str) -> str:
    """The error that ended a child, in one line."""
    named = [line for line in errors.splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    if named:
        return named[-1][:300]
    last = errors.strip().splitlines()[-1:] or [""]
    killed = " (killed: too little RAM?)" if code in (-9, 137) else ""
    return f"exit code {code}{killed} {last[0]}".strip()[:300]


def driver() -> str:
    """The driver's version, if its tool is there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else "unknown"
