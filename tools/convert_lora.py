"""Convert a network between the spellings of kohya, diffusers, OneTrainer, ai-toolkit and LyCORIS.

    python -m tools.convert_lora IN.safetensors OUT.safetensors --format diffusers

Any known spelling is read; kohya's or diffusers' is written. What a LoRA cannot say exactly (LoHa, LoKr, GLoRA, OFT,
DoRA) becomes a LoRA of --rank or --energy, and the error is printed; some of them need --base.
"""

import argparse
from pathlib import Path

from tools.lora_arguments import add_output, add_size, new_file, run


def main(options: argparse.Namespace) -> None:
    """Read, turn into LoRAs if asked, write."""
    from library.models.checkpoint_file import TransformerFile
    from library.networks import surgery
    from library.networks.file import DTYPES, save_copy
    from library.networks.loading import load_network

    output = new_file(options.output)
    network = load_network(options.input)
    change = network.change
    if options.base is not None:
        change = surgery.with_base(change, TransformerFile.open(options.base))
    if options.rank is not None or options.energy is not None:
        change, errors = surgery.resized(change, options.rank, options.energy)
        worst = max(errors, key=errors.get)
        print(f"relative error: {sum(errors.values()) / len(errors):.3g} on average, {errors[worst]:.3g} in {worst}")
    for path in save_copy(output, change, network.metadata, format=options.format, dtype=DTYPES[options.precision]):
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=Path, help="the checkpoint the network belongs to")
    add_output(parser)
    add_size(parser, required=False)
    raise SystemExit(run(main, parser))
