"""Add networks together, or merge them into a base checkpoint.

    python -m tools.merge_lora OUT.safetensors A.safetensors=0.7 B.safetensors=0.5 [--rank 32]
    python -m tools.merge_lora OUT A.safetensors=1.0 --base flux1-fill-dev.safetensors

Without --base the result is a network: exactly the weighted sum (ranks add up), or its best LoRA of --rank or --energy.
With --base it is the checkpoint with the networks in it, written tensor by tensor in the base's own layout and
precision: a BFL file becomes a file, the `transformer` folder of a diffusers base becomes a folder.
"""

import argparse
from pathlib import Path

from library.errors import NetworkFileError
from tools.lora_arguments import add_output, add_size, network_and_weight, new_file, run, say_errors


def main(options: argparse.Namespace) -> None:
    """Merge into the base if there is one, else into one network."""
    from library.networks import surgery
    from library.networks.baking import bake
    from library.networks.file import DTYPES, save_copy
    from library.networks.loading import load_network

    networks = [(load_network(path), weight) for path, weight in options.networks]
    changes = [(network.change, weight) for network, weight in networks]
    if options.base is not None:
        _refuse_options_of_networks(options)
        changed = bake(options.base, options.output, changes)
        print(f"{options.output}: {changed} tensors changed")
        return
    output = new_file(options.output)
    total = surgery.added(changes)
    if options.rank is not None or options.energy is not None:
        total, errors = surgery.resized(total, options.rank, options.energy)
        say_errors(errors)
    said = {"ss_training_comment": "merged from " + ", ".join(f"{n.path.name} x {w:g}" for n, w in networks)}
    metadata, notes = surgery.agreed([network for network, _ in networks])
    for name in ("influx_trained_alpha", "influx_trained_scale"):
        metadata.pop(name, None)
    for note in notes:
        print(note)
    form, precision = options.format or "kohya", options.precision or "bf16"
    for path in save_copy(output, total, metadata | said, format=form, dtype=DTYPES[precision]):
        print(path)


def _refuse_options_of_networks(options: argparse.Namespace) -> None:
    """With --base a checkpoint is written, in its own layout and precision: these would do nothing."""
    given = [name for name in ("rank", "energy", "format", "precision") if getattr(options, name) is not None]
    if given:
        raise NetworkFileError(
            f"--{' and --'.join(given)} cannot act with --base: the checkpoint keeps its own layout and precision, and"
            " nothing is lost. Remove it, or make a smaller network first with python -m tools.resize_lora"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("networks", type=network_and_weight, nargs="+", metavar="FILE[=WEIGHT]")
    parser.add_argument("--base", type=Path, help="merge into this BFL file or diffusers transformer folder")
    add_output(parser, defaults=False)
    add_size(parser, required=False)
    raise SystemExit(run(main, parser))
