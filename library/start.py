"""What the three scripts share: read the configuration, run the job, turn errors into messages and exit codes.

Nothing heavy is imported here: a job's module is imported by the script only after its configuration is valid.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from library.config import Command, Run, help_text, load
from library.errors import DiskError, OutOfMemory, Stopped, UserError
from library.memory import allocator

log = logging.getLogger("influx")

Job = Callable[[Run], int | None]


def start(command: Command, job: Job, argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command to its end and exit with its code."""
    words = sys.argv[1:] if argv is None else list(argv)
    code = run_command(command, job, words)
    sys.stdout.flush()
    sys.exit(code)


def run_command(command: Command, job: Job, argv: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors that are no one's but ours keep their traceback."""
    _set_up_output()
    debug = "--debug" in argv
    try:
        if "--help" in argv or "-h" in argv:
            print(help_text(command, _after(argv, "--help", "-h")), flush=True)
            return 0
        run = load(argv, command)
        for warning in run.warnings:
            log.warning("warning: %s", warning)
        _set_up_process(run)
        return job(run) or 0
    except UserError as error:
        return _report(error, debug)
    except KeyboardInterrupt as error:
        return _report(_caused(Stopped("stopped by Ctrl-C.", 130), error), debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _report(_caused(DiskError(_disk_message(error)), error), debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        advice = "Try a smaller resolution or batch, base_precision, blocks_to_swap, or vram_budget_gb."
        return _report(_caused(OutOfMemory(f"out of memory: {str(error) or 'RAM'}. {advice}"), error), debug)


def _after(argv: Sequence[str], *options: str) -> str | None:
    """The word behind one of the options, if there is one."""
    at = min(argv.index(option) for option in options if option in argv) + 1
    return argv[at].strip("[]") if at < len(argv) and not argv[at].startswith("-") else None


def _report(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _caused(error: UserError, cause: BaseException) -> UserError:
    error.__cause__ = cause
    return error


def _disk_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _set_up_output() -> None:
    """Messages on stderr, and no file name that the terminal's encoding could stumble over."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("influx", "library"):
        logging.getLogger(name).setLevel(level)
    # on CPUs it asks for a package that would fetch code from the hub; InFlux does not want it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _set_up_process(run: Run) -> None:
    """What has to be in the environment before torch is imported."""
    allocator.configure()
    if run.saving.hub_token:
        os.environ.setdefault("HF_TOKEN", run.saving.hub_token)
    rank = run.training.local_rank
    if rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(rank))
