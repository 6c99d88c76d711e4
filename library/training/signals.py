"""Being asked to stop: Ctrl-C, SIGTERM, SIGHUP and a file named STOP end a run at the next step boundary, saved."""

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)
STOP_FILE = "STOP"
EXIT_INTERRUPT, EXIT_TERMINATE = 130, 143
_PR_SET_PDEATHSIG = 1
_NAMES = {"SIGINT": "Ctrl-C", "SIGHUP": "SIGHUP (its terminal was closed)"}


class StopAsked(Exception):
    """Raised out of what takes long between two steps, so that the run can save and end."""


class StopRequests:
    """Installs the handlers for the length of a `with` block, and remembers the first request."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.exit_code = 0
        self.reason = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        for number in _handled():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code:
            raise KeyboardInterrupt  # the second Ctrl-C: leave now; files are whole in any case
        name = signal.Signals(number).name
        self._ask(EXIT_INTERRUPT if number == signal.SIGINT else EXIT_TERMINATE, _NAMES.get(name, name))
        if number == signal.SIGINT:
            # os.write, because a handler must not wait for a lock the interrupted code may hold
            os.write(2, b"\nStopping after this step, and saving. Press Ctrl-C again to leave at once.\n")

    def _ask(self, exit_code: int, reason: str) -> None:
        if not self.exit_code:
            self.exit_code = exit_code
            self.reason = reason

    def forget_file(self) -> None:
        """Remove a STOP file that was left before the run began: it was meant for another one."""
        path = self.folder / STOP_FILE
        if path.exists():
            path.unlink(missing_ok=True)
            log.info("%s was there before the run began, and is removed", path)

    def check(self, *_: object) -> None:
        """Raises StopAsked if the run was asked to stop. Only the main process calls it."""
        self.look_for_file()
        if self.exit_code:
            raise StopAsked

    def look_for_file(self) -> None:
        """Take a STOP file in the output folder as a Ctrl-C, and remove it so that the next run does not stop."""
        path = self.folder / STOP_FILE
        if path.exists():
            path.unlink(missing_ok=True)
            self._ask(EXIT_INTERRUPT, "a file named STOP")


def _handled() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def was_launched() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies: `accelerate launch` does not pass signals on.

    Only Linux offers this; elsewhere the launcher's own behaviour stands.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
