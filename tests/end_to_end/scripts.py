"""Runs the real scripts as a user does: own process, own working folder, exit code and both outputs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int | None
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything it printed."""
        return self.out + self.err


def run_script(script: str, *words: object, folder: Path) -> Done:
    """Run `script` of the repository with these arguments in `folder`, forked from a process with warm imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.end_to_end.preload"])
    out, err = (folder / f".{name}-{os.urandom(4).hex()}" for name in ("out", "err"))
    process = context.Process(target=_run, args=(ROOT / script, [str(word) for word in words], folder, out, err))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode is not None, f"{script} did not end within {TIMEOUT} s"
    done = Done(process.exitcode, out.read_text("utf-8", "replace"), err.read_text("utf-8", "replace"))
    out.unlink()
    err.unlink()
    return done


def _run(script: Path, words: list[str], folder: Path, out: Path, err: Path) -> None:
    """In the new process: become `python script words...`."""
    os.chdir(folder)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [str(script), *words]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def succeeded(done: Done) -> Done:
    """The same, if the script ended well."""
    assert done.code == 0, done.said
    return done
