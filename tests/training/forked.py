"""Runs of the real job in forked children: torch is imported once, a run can be killed, and the next one is cheap."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import library.training.job  # noqa: F401  (loaded once here, so that no child has to)
from tests.training.project import Project

PATIENCE = 120.0


def start(job: Callable[[], int]) -> int:
    """Run `job` in a child and return its process id. What it says on stderr is kept for `said`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            words = os.open(_log(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(words, 2)
            code = job()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            raise
        finally:
            os._exit(code)
    return child


def _log(child: int) -> Path:
    return Path(tempfile.gettempdir()) / f"influx-test-child-{child}.log"


def said(child: int) -> str:
    """The end of what a child wrote to stderr; forgets it."""
    text = _log(child).read_text(encoding="utf-8", errors="replace") if _log(child).exists() else ""
    _log(child).unlink(missing_ok=True)
    return text[-3000:]


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
    """Run to the end in a child; says what went wrong if it does not end well."""
    child = start(lambda: project.train(output_dir=output, **options))
    code = wait(child)
    words = said(child)
    assert code in (0, 2, 3, 4, 5, 130, 143), words
    return code


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
