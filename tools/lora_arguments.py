"""What the tools for network files share: their options, and errors as plain messages with exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from library.errors import NetworkFileError, UserError


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> int:
    """Parse the command line and run; a user's mistake ends with one message and its exit code."""
    options = parser.parse_args()
    try:
        return main(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def new_file(path: Path) -> Path:
    """The path of a file to write: nothing is overwritten, and the name must say what it is."""
    if path.suffix != ".safetensors":
        raise NetworkFileError(f"{path}: the output must end in .safetensors")
    if path.exists():
        raise NetworkFileError(f"{path} exists already; nothing is overwritten")
    return path


def add_output(parser: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    """The options of every tool that writes a network. Without ``defaults`` what is not given is None."""
    formats, precisions = ("kohya", "diffusers", "both"), ("fp32", "fp16", "bf16")
    parser.add_argument(
        "--format", choices=formats, default="kohya" if defaults else None, help="names in the file (kohya)"
    )
    parser.add_argument(
        "--precision", choices=precisions, default="bf16" if defaults else None, help="of the factors (bf16)"
    )


def add_size(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Rank or energy of a singular value decomposition."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--rank", type=positive, help="the same rank for every module")
    group.add_argument("--energy", type=share, help="keep this share (0.99) of each module's squared singular values")


def say_errors(errors: dict[str, float]) -> None:
    """Print what a resizing lost; nothing where there was nothing to resize (x_embedder alone is kept exactly)."""
    if errors:
        worst, mean = max(errors, key=errors.get), sum(errors.values()) / len(errors)
        print(f"relative error: {mean:.3g} on average, {errors[worst]:.3g} in {worst}")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def network_and_weight(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE=WEIGHT`."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} in {text!r} is no number") from None
