"""Convert a network between the spellings of kohya, diffusers, OneTrainer, ai-toolkit and LyCORIS.

    python -m tools.convert_lora IN.safetensors OUT.safetensors --format diffusers

Any known spelling is read; kohya's or diffusers' is written. What a LoRA cannot say exactly (LoHa, LoKr, GLoRA, OFT,
DoRA) becomes a LoRA of --rank or --energy, and the error is printed; some of them need --base.
"""

import argparse
from pathlib import Path

from tools.lora_arguments import add_output, add_size, new_file, run, say_errors


def main(options: argparse.Namespace) -> None:
    """Read, turn into LoRAs if asked, write."""
    from library.models.checkpoint_file import TransformerFile
    from library.networks import surgery
    from library.networks.file import DTYPES, save_copy
    from library.networks.loading import load_network

    output = new_file(options.output)
    network = load_network(options.input)
    change = surgery.without_text(network.change) if options.without_text_encoder else network.change
    if options.base is not None:
        change = surgery.with_base(change, TransformerFile.open(options.base))
    if options.rank is not None or options.energy is not None:
        change, errors = surgery.resized(change, options.rank, options.energy)
        say_errors(errors)
    metadata = surgery.carried(network, change)
    for path in save_copy(output, change, metadata, format=options.format, dtype=DTYPES[options.precision]):
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=Path, help="the checkpoint the network belongs to")
    parser.add_argument("--without_text_encoder", action="store_true", help="leave CLIP-L's part out")
    add_output(parser)
    add_size(parser, required=False)
    raise SystemExit(run(main, parser))
