"""Adds masks to a Fill Circles folder: the same task, confined to a part of the picture.

    python tools/circle_regions.py --data data/fill_circles --seed 0

For every pair a box is drawn, at least half the picture in each direction. Inside it the target is the filled circle on
its background, outside it stays the outline it was. Writes beside train_A and train_B (and the same for the test):

    train_regions     masks: white where the picture is to change
    train_region_B    targets that differ from train_A inside the mask only

They serve `mode = "edit"` within a region, and `mode = "mask"` with masks from files and targets of their own.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def draw_region(seed: int, part: str, stem: str, size: tuple[int, int]) -> Image.Image:
    """The mask of one item; depends on the arguments alone."""
    rng = random.Random(f"region:{seed}:{part}:{stem}")
    width, height = (rng.randint((side + 1) // 2, side) for side in size)
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((left, top, left + width - 1, top + height - 1), fill=255)
    return mask


def add_regions(data: Path, seed: int = 0) -> list[Path]:
    """Write masks and targets for both parts; returns the files. Raises ValueError if there is no such data."""
    written = []
    for part in ("train", "test"):
        sources = sorted((data / f"{part}_A").glob("*.png"))
        if not sources:
            raise ValueError(f"{data} holds no {part}_A: make it with tools/fill_circles.py first")
        for folder in (f"{part}_regions", f"{part}_region_B"):
            (data / folder).mkdir(exist_ok=True)
        for path in sources:
            source, target = Image.open(path), Image.open(data / f"{part}_B" / path.name)
            mask = draw_region(seed, part, path.stem, source.size)
            files = {f"{part}_regions": mask, f"{part}_region_B": Image.composite(target, source, mask)}
            for folder, image in files.items():
                image.save(data / folder / path.name)
                written.append(data / folder / path.name)
    return written


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/fill_circles"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        files = add_regions(options.data, options.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(files)} files to {options.data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
