"""Make a network smaller: its best LoRA of a rank, or of the least rank that keeps a share of its energy.

python -m tools.resize_lora IN.safetensors OUT.safetensors --rank 16
python -m tools.resize_lora IN.safetensors OUT.safetensors --energy 0.99
"""

import argparse
from pathlib import Path

from tools.lora_arguments import add_output, add_size, new_file, run


def main(options: argparse.Namespace) -> None:
    """Resize every module and say what that loses."""
    from library.models.checkpoint_file import TransformerFile
    from library.networks import surgery
    from library.networks.file import DTYPES, save_copy
    from library.networks.loading import load_network

    output = new_file(options.output)
    network = load_network(options.input)
    change = network.change
    if options.base is not None:
        change = surgery.with_base(change, TransformerFile.open(options.base))
    change, errors = surgery.resized(change, options.rank, options.energy)
    for module, error in sorted(errors.items(), key=lambda item: -item[1])[:5]:
        print(f"{module}: relative error {error:.3g}")
    ranks = sorted({factors.rank for factors in change.entries.values()})
    print(f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}")
    metadata = surgery.carried(network, change)
    for path in save_copy(output, change, metadata, format=options.format, dtype=DTYPES[options.precision]):
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=Path, help="the checkpoint the network belongs to (GLoRA, OFT and DoRA need it)")
    add_output(parser)
    add_size(parser)
    raise SystemExit(run(main, parser))
