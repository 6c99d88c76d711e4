"""Draws docs/images/modes.png: what each mode feeds the model, made by the library's own modes.

    python tools/draw_modes.py

One item of Fill Circles goes through every mode. Across: the picture the VAE encodes as the condition, the mask (white
is repainted), the target the noise is added to, and the part of the result that the user gets.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from library.conditioning import MODES, Images, ModeSettings
from library.sampling.pixels import to_bytes
from tools.circle_regions import draw_region
from tools.fill_circles import Circle, draw_outline, draw_target

SIDE = 96
SCALE = 1.5
MARGIN = 14
LABEL = 190
LINE = 24
COLUMNS = ("condition (encoded)", "mask", "target", "you get")
CIRCLE = Circle("modes", SIDE, SIDE, 50.0, 42.0, 26.0, "orange", "blue", "seen_pair")


@dataclass(frozen=True)
class Row:
    """One line of the picture: its label, the mode, and what a subset would give it."""

    label: str
    mode: str
    images: Images


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1


def rows() -> list[Row]:
    """Every preset of the four-part item."""
    outline, filled = draw_outline(CIRCLE), draw_target(CIRCLE)
    region = draw_region(3, "modes", "a", outline.size)
    masks = (torch.from_numpy(np.asarray(region).copy() > 127).float()[None],)
    part = pixels(Image.composite(filled, outline, region))
    source, target = pixels(outline), pixels(filled)
    return [
        Row("edit", "edit", Images(source, target)),
        Row("edit, mask_dir", "edit", Images(source, part, masks)),
        Row("mask", "mask", Images(target, None, masks)),
        Row("mask, target_dir", "mask", Images(source, part, masks)),
        Row("spatial", "spatial", Images(source, target)),
    ]


def cells(row: Row) -> list[Image.Image]:
    """The four pictures of a row."""
    item = MODES[row.mode].items(row.images, ModeSettings(mask_only_right=True))[0]
    assert item.target is not None
    mask = item.mask.expand(3, -1, -1) * 2 - 1
    shown = (item.condition_pixels(), mask, item.target, MODES[row.mode].result(item.target))
    return [Image.fromarray(to_bytes(part).numpy()) for part in shown]


def draw() -> Image.Image:
    """The whole picture."""
    font = ImageFont.load_default(15)
    wide = round(2 * SIDE * SCALE)
    picture = Image.new(
        "RGB",
        (LABEL + len(COLUMNS) * (wide + MARGIN) - wide // 2, LINE + len(rows()) * (round(SIDE * SCALE) + MARGIN)),
        "white",
    )
    pen = ImageDraw.Draw(picture)
    for number, label in enumerate(COLUMNS):
        pen.text((LABEL + number * (wide + MARGIN), 4), label, "black", font)
    top = LINE
    for row in rows():
        pen.text((MARGIN, top + 4), row.label, "black", font)
        for number, cell in enumerate(cells(row)):
            size = (round(cell.width * SCALE), round(cell.height * SCALE))
            left = LABEL + number * (wide + MARGIN)
            picture.paste(cell.resize(size, Image.Resampling.NEAREST), (left, top))
            pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline="lightgray")
        top += round(SIDE * SCALE) + MARGIN
    return picture


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/modes.png"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw().save(options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
