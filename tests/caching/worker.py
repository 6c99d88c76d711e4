"""Runs the caching command's main in forked children: models' libraries are imported once, trials cost little."""

from __future__ import annotations

import os
import signal
import sys
import time


def serve() -> None:
    """Lines in: a delay in seconds (negative: run to the end), then the arguments. Lines out: exit code, seconds."""
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401  (imported before the fork)
    import transformers  # noqa: F401

    from library import caching
    from library.start import run_command

    print("ready", flush=True)
    for line in sys.stdin:
        delay, *arguments = line.rstrip("\n").split("\t")
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            code = run_command("cache", caching.run, arguments)
            os._exit(code)
        if float(delay) >= 0:
            time.sleep(float(delay))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(f"{os.waitstatus_to_exitcode(status)} {time.monotonic() - started:.3f}", flush=True)


if __name__ == "__main__":
    serve()
