"""Rebuilds the nano base from nothing: text encoders, VAE, transformer, export, measurements.

    python -m tools.nano.build --work_dir output/nano --output_dir nano

Each stage is a command of its own and continues where it was cut off, so that the same line can be run again. Takes
about two hours on two CPU cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

VAE_STEPS = 5000
TRANSFORMER_STEPS = 11100
DECODER_STEPS = 800


def stages(work_dir: Path, output_dir: Path, seed: int, replicas: int) -> list[list[str]]:
    """The commands, in order."""
    common = ["--work_dir", str(work_dir), "--seed", str(seed)]
    parallel = ["--replicas", str(replicas)]
    vae = ["tools.nano.vae", *common, *parallel]
    return [
        ["tools.nano.texts", *common],
        [*vae, "--steps", str(VAE_STEPS)],
        [*vae, "--steps", str(DECODER_STEPS), "--decoder_only"],
        ["tools.nano.train", *common, *parallel, "--steps", str(TRANSFORMER_STEPS)],
        ["tools.nano.export", "--work_dir", str(work_dir), "--output_dir", str(output_dir)],
        ["tools.nano.measure", "--base", str(output_dir)],
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/nano"))
    parser.add_argument("--output_dir", type=Path, default=Path("nano"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=2, help="single-threaded processes that train together")
    options = parser.parse_args()
    for stage in stages(options.work_dir, options.output_dir, options.seed, options.replicas):
        command = [sys.executable, "-m", *stage]
        print(" ".join(command), flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
