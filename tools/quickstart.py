"""The whole way once, on the nano base: data, cache, training, editing, comparison. Nothing here but plain commands.

    python tools/quickstart.py

Each command is echoed as a user would type it and run as it is. A run from an earlier quickstart is moved aside.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("output/quickstart")
DATA = Path("data/fill_circles")
CONFIG = "config_examples/quickstart.toml"
COMMANDS = (
    f"tools/fill_circles.py --output_dir {DATA.as_posix()} --num_train 1000 --num_test 200 --size 64 --seed 0",
    f"influx_cache.py --config_file {CONFIG}",
    f"influx_train.py --config_file {CONFIG}",
    f"influx_infer.py --config_file {CONFIG}",
    f"influx_infer.py --config_file {CONFIG} --lora none --output {(OUTPUT / 'base').as_posix()}",
    f"tools/compare_circles.py --data {DATA.as_posix()} --base nano --before {(OUTPUT / 'base').as_posix()}"
    f" --after {(OUTPUT / 'edited').as_posix()} --output_dir {OUTPUT.as_posix()}",
)
RESULTS = ("quickstart.safetensors", "comparison.png", "metrics.json")


def move_aside(folder: Path) -> Path | None:
    """Give an earlier run's folder a number, so that nothing of it is lost; returns its new name."""
    if not folder.exists():
        return None
    number = 1
    while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(kept)
    return kept


def main() -> int:
    """Run every command; the first that fails ends it with its exit code."""
    started = time.monotonic()
    kept = move_aside(ROOT / OUTPUT)
    if kept is not None:
        print(f"an earlier quickstart is kept as {kept.relative_to(ROOT)}", flush=True)
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode
        if code:
            return code
    print(f"\ndone in {time.monotonic() - started:.0f} s:")
    for name in RESULTS:
        print(f"  {(OUTPUT / name).as_posix()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
