"""Masks of one item: from a file, from transparency, or drawn; grown, moved and only then made binary.

All drawing is keyed by the picture's own bytes, so that the same picture gets the same masks in any data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from library.data.chance import chance
from library.data.images import MASK_THRESHOLD


@dataclass(frozen=True)
class MaskSettings:
    """How masks of a subset come about. kinds: drawn instead of read; variants: how many are cached of each item.

    with_full: one more variant that repaints everything, always the last.
    """

    kinds: tuple[str, ...] = ()
    variants: int = 1
    with_full: bool = False
    dilation: int = 0
    jitter: int = 0
    invert: bool = False
    seed: int = 0

    def count(self, *, drawn: bool) -> int:
        """How many masks an item gets."""
        return (self.variants if drawn or self.jitter else 1) + self.with_full


def variants(grey: Image.Image | None, size: tuple[int, int], key: str, settings: MaskSettings) -> list[np.ndarray]:
    """The masks (H, W), bool, of one item. grey: its mask at its final size, None if it is to be drawn."""
    count = settings.count(drawn=grey is None) - settings.with_full
    made = []
    for number in range(count):
        draw = chance("mask", settings.seed, key, number)
        base = _drawn(draw, settings.kinds[number % len(settings.kinds)], size) if grey is None else grey
        if settings.invert and grey is not None:
            base = ImageChops.invert(base)
        made.append(np.asarray(_altered(base, draw, settings)) >= MASK_THRESHOLD)
    if settings.with_full:
        made.append(np.ones((size[1], size[0]), bool))
    return made


def _altered(mask: Image.Image, draw: Random, settings: MaskSettings) -> Image.Image:
    growth = settings.dilation
    if settings.jitter:
        growth += draw.randint(-settings.jitter, settings.jitter)
        shift = (draw.randint(-settings.jitter, settings.jitter), draw.randint(-settings.jitter, settings.jitter))
        moved = Image.new("L", mask.size, 0)
        moved.paste(mask, shift)
        mask = moved
    step = ImageFilter.MaxFilter(3) if growth > 0 else ImageFilter.MinFilter(3)
    for _ in range(abs(growth)):
        mask = mask.filter(step)
    return mask


def _drawn(draw: Random, kind: str, size: tuple[int, int]) -> Image.Image:
    return KINDS[kind](draw, *size)


def _box(draw: Random, width: int, height: int) -> Image.Image:
    """One to three boxes, each a fifth to three fifths of a side."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(draw.randint(1, 3)):
        across, down = (max(1, round(side * draw.uniform(0.2, 0.6))) for side in (width, height))
        left, top = draw.randint(0, width - across), draw.randint(0, height - down)
        pen.rectangle((left, top, left + across - 1, top + down - 1), fill=255)
    return mask


def _brush(draw: Random, width: int, height: int) -> Image.Image:
    """One to four strokes of a round brush."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(draw.randint(1, 4)):
        thickness = max(2, round(min(width, height) * draw.uniform(0.06, 0.2)))
        points = [(draw.uniform(0, width), draw.uniform(0, height)) for _ in range(draw.randint(2, 6))]
        pen.line(points, fill=255, width=thickness, joint="curve")
        for x, y in points:
            radius = thickness / 2
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _half(draw: Random, width: int, height: int) -> Image.Image:
    """The left, right, upper or lower half."""
    x, y = width // 2, height // 2
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, draw.choice([(0, 0, x, height), (x, 0, width, height), (0, 0, width, y), (0, y, width, height)]))
    return mask


def _outpaint(draw: Random, width: int, height: int) -> Image.Image:
    """Everything but a box of two fifths to nine tenths of each side."""
    mask = Image.new("L", (width, height), 255)
    across, down = (max(1, round(side * draw.uniform(0.4, 0.9))) for side in (width, height))
    left, top = draw.randint(0, width - across), draw.randint(0, height - down)
    mask.paste(0, (left, top, left + across, top + down))
    return mask


def _full(draw: Random, width: int, height: int) -> Image.Image:
    return Image.new("L", (width, height), 255)


KINDS = {"box": _box, "brush": _brush, "half": _half, "outpaint": _outpaint, "full": _full}
