"""Extract the LoRA that leads from one checkpoint to another.

    python -m tools.extract_lora BASE TUNED OUT.safetensors --rank 32

Both are checkpoints of the same FLUX (BFL file, diffusers transformer folder, GGUF), read one weight at a time. img_in
is kept exactly. Changes of biases and norms, which a LoRA cannot carry, are listed.
"""

import argparse
from pathlib import Path

from tools.lora_arguments import add_output, add_size, new_file, run


def main(options: argparse.Namespace) -> None:
    """Extract module by module, then write."""
    from library.models.checkpoint_file import TransformerFile
    from library.networks import surgery
    from library.networks.change import Change
    from library.networks.file import DTYPES, save_copy

    output = new_file(options.output)
    base, tuned = TransformerFile.open(options.base), TransformerFile.open(options.tuned)
    change, worst = Change(), (0.0, "")
    for module, size, factors, error in surgery.extracted(base, tuned, options.rank, options.energy):
        if factors is not None:
            change.sizes[module] = size
            change.entries[(module, (0, size[0]))] = factors
            worst = max(worst, (error, module))
    if not change.entries:
        print("the two checkpoints have the same weights: there is nothing to extract")
        return
    print(f"{len(change.entries)} modules, relative error {worst[0]:.3g} at worst ({worst[1]})")
    lost = surgery.other_changes(base, tuned)
    if lost:
        print(f"not carried (biases and norms): {len(lost)}, first {lost[0]}")
    said = {"ss_training_comment": f"extracted: {options.tuned.name} - {options.base.name}"}
    for path in save_copy(output, change, said, format=options.format, dtype=DTYPES[options.precision]):
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("output", type=Path)
    add_output(parser)
    add_size(parser)
    raise SystemExit(run(main, parser))
