"""Runs of the real job in forked children: torch is imported once, a run can be killed, and the next one is cheap."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.training.project import Project

PATIENCE = 120.0


def start(job: Callable[[], int]) -> int:
    """Run `job` in a child and return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = job()
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    """Exit code of a child; negative: the signal that ended it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the run did not end")


def finish(project: Project, output: str | Path, **options: object) -> int:
    """Run to the end in a child."""
    return wait(start(lambda: project.train(output_dir=output, **options)))


def until(condition: Callable[[], bool], child: int) -> None:
    """Wait until something is the case, while a child works on it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        ended, status = os.waitpid(child, os.WNOHANG)
        assert not ended, f"the run ended before with {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.005)


def steps_done(folder: Path) -> int:
    """Lines in a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
