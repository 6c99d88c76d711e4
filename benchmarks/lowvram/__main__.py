"""Measure, print the Markdown and write it with the JSON: `python -m benchmarks.lowvram`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import lowvram
from benchmarks.lowvram.arms import ARMS
from benchmarks.lowvram.child import Job
from benchmarks.lowvram.report import markdown, record
from benchmarks.lowvram.run import ROOT, Outcome, driver, measure
from benchmarks.lowvram.targets import judge
from library.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results"
SIZES, TOY_SIZES = (512, 768, 1024), (32,)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=lowvram.__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="which arms")
    parser.add_argument("--list", action="store_true", help="print the arms in their order and stop")
    parser.add_argument("--pixels", nargs="+", type=int, help=f"sizes; {' '.join(map(str, SIZES))} if not given")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no new arm after this time")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of an arm at a size")
    parser.add_argument("--seconds", type=float, default=15.0, help="time fewer steps once they took this long")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--cap_gb", type=float, help="imitate a card of this size: torch gets it less the context")
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    parser.add_argument("--together", action="store_true", help="all arms in this process: no peak of RAM, for tests")
    parser.add_argument("--output", type=Path, help="the JSON's path; the Markdown lies beside it")
    given = parser.parse_args()
    if not (given.toy or given.list or torch.cuda.is_available()):
        parser.error("full size needs a CUDA card; --toy runs anywhere")
    return given


def default_output(cap_gb: float | None) -> Path:
    """Where the numbers of a card, or of one that is held to be smaller, are kept."""
    return RESULTS / ("lowvram.json" if cap_gb is None else f"lowvram_{cap_gb:g}gb.json")


def about_this_run(given: argparse.Namespace) -> dict[str, object]:
    """What the numbers belong to, beside the card."""
    return {
        "driver": driver(),
        "host": f"{platform.system()}, {os.cpu_count()} CPU cores",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "toy": given.toy,
        "text": given.text,
        "cap_gb": given.cap_gb,
    }


def main() -> None:
    """Everything is written after every arm, so that an interrupted run has its numbers."""
    given = arguments()
    if given.list:
        print("\n".join(ARMS))
        return
    target = given.output or (None if given.toy else default_output(given.cap_gb))
    sizes = tuple(given.pixels or (TOY_SIZES if given.toy else SIZES))
    about = about_this_run(given)

    def write(outcome: Outcome) -> str:
        known = about | {"device": outcome.ceilings.device, "torch": outcome.ceilings.torch}
        everything = known, outcome.ceilings, outcome.rows, judge([] if given.toy else outcome.rows), outcome.left_out
        if target is not None:
            atomic_write(target, json.dumps(record(*everything), indent=2) + "\n")
            atomic_write(target.with_suffix(".md"), markdown(*everything))
        return markdown(*everything)

    def progress(outcome: Outcome) -> None:
        write(outcome)
        measured = [one.measured for one in outcome.rows]
        latest = [f"{m.pixels} px {m.seconds:.3f} s" for m in measured if m.arm == measured[-1].arm]
        failed = f"; {len(outcome.left_out)} without numbers" if outcome.left_out else ""
        print(f"{measured[-1].arm}: {', '.join(latest)}{failed}" if measured else failed[2:], flush=True)

    job = Job("", sizes, given.steps, given.seconds, given.text, given.toy, given.cap_gb)
    print(write(measure(given.arms, job, given.minutes, not given.together, progress)))


if __name__ == "__main__":
    main()
