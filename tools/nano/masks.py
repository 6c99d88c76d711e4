"""Random masks for inpainting: 1 (white) is repainted, 0 (black) is kept."""

import random

import numpy as np
from PIL import Image, ImageDraw


def full_mask(rng: random.Random, width: int, height: int) -> Image.Image:
    """Everything is repainted."""
    return Image.new("L", (width, height), 255)


def box_mask(rng: random.Random, width: int, height: int) -> Image.Image:
    """One to three boxes."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(rng.randint(1, 3)):
        w, h = rng.uniform(0.2, 0.7) * width, rng.uniform(0.2, 0.7) * height
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        pen.rectangle([x, y, x + w, y + h], fill=255)
    return mask


def half_mask(rng: random.Random, width: int, height: int) -> Image.Image:
    """The left, right, upper or lower half exactly; of wide pictures mostly the right half."""
    side = "right" if width >= 2 * height and rng.random() < 0.6 else rng.choice(("left", "right", "top", "bottom"))
    boxes = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
    }
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, boxes[side])
    return mask


def brush_mask(rng: random.Random, width: int, height: int) -> Image.Image:
    """A thick zigzag, as a hand would paint it."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    thick = rng.uniform(0.15, 0.35) * min(width, height)
    points = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(rng.randint(2, 5))]
    pen.line(points, fill=255, width=round(thick), joint="curve")
    for x, y in points:
        pen.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=255)
    return mask


MASKS = {full_mask: 0.4, box_mask: 0.25, half_mask: 0.2, brush_mask: 0.15}


def make_mask(seed: int, index: int, width: int, height: int) -> Image.Image:
    """Mask number `index` of the stream `seed`."""
    rng = random.Random(f"mask:{seed}:{index}:{width}x{height}")
    return rng.choices(list(MASKS), list(MASKS.values()))[0](rng, width, height)


def blank(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The condition picture of FLUX Fill: mid-grey (0 of [-1, 1]) where the mask is 1, the picture elsewhere."""
    return pixels * (1 - mask)
