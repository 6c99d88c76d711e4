"""Say what becomes of a network's file: every key's fate in each program, and modules that look ill.

    python -m tools.check_lora NET.safetensors [--program ComfyUI] [--keys]

Exit code 0 if every asked program takes the whole file and no module is ill, else 1.
"""

import argparse
from pathlib import Path

from tools.lora_arguments import run


def main(options: argparse.Namespace) -> int:
    """Print a line per program and per problem; 1 if there is any."""
    from library.networks import acceptance
    from library.networks.change import read_change
    from library.tensorfile import read_header

    header = read_header(options.network)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    integers = frozenset(name for name, info in header.tensors.items() if info.dtype.startswith(("I", "U")))
    found = acceptance.fates(shapes, integers)
    programs = options.program or acceptance.PROGRAMS
    problems = sum(_print_program(program, found, options.keys) for program in programs)
    known = {name: tensor for name, tensor in _tensors(options.network).items() if _is_known(name)}
    for module in acceptance.health(read_change(known, str(options.network))[0]):
        if module.problem is not None:
            problems += 1
            print(f"{module.module}: {module.problem}")
    return 1 if problems else 0


def _print_program(program: str, found, every_key: bool) -> bool:
    lost = found.lost(program)
    if program in found.refused:
        print(f"{program}: refuses the file: {found.refused[program]}")
    elif lost:
        print(f"{program}: {len(found.keys) - len(lost)} of {len(found.keys)} keys loaded")
    else:
        print(f"{program}: all {len(found.keys)} keys loaded")
    reasons: dict[str, list[str]] = {}
    for key in lost:
        reasons.setdefault(found.keys[key][program], []).append(key)
    for reason, keys in reasons.items():
        shown = keys if every_key else keys[:3]
        print(
            f"  {reason}: {', '.join(shown)}{f' and {len(keys) - len(shown)} more' if len(keys) > len(shown) else ''}"
        )
    return bool(lost) or program in found.refused


def _tensors(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def _is_known(name: str) -> bool:
    from library.networks.names import parse

    meaning = parse(name)
    return meaning is not None and meaning.tensor not in ("lora_B.bias", "set_weight", "reshape_weight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument(
        "--program", action="append", choices=("ComfyUI", "Forge", "diffusers", "kohya", "Nunchaku"),
        help="only this one; may be given again",
    )  # fmt: skip
    parser.add_argument("--keys", action="store_true", help="name every key that is not loaded")
    raise SystemExit(run(main, parser))
