"""One scale and one crop for all images of an item.

The crop is kept in fractions of the picture, so a source of half the target's size, a mask and both halves of a joined
canvas are cut at the same places, to the fraction of a pixel, in one resampling step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Geometry:
    """Where an item's pixels come from: ``box`` of each picture (left, top, right, bottom in fractions), scaled to
    (width, height), then mirrored if ``flip``."""

    width: int
    height: int
    box: Box
    flip: bool = False


def crop_box(size: tuple[int, int], bucket: tuple[int, int], place: tuple[float, float], *, unscaled: bool) -> Box:
    """The largest part of a picture of ``size`` that has the bucket's aspect, at ``place`` (0 left/top, 0.5 centre).

    ``unscaled``: the bucket is no larger than the picture, and is cut out of it pixel by pixel.
    """
    scale = 1.0 if unscaled else max(bucket[0] / size[0], bucket[1] / size[1])
    share = [min(1.0, bucket[axis] / (size[axis] * scale)) for axis in (0, 1)]
    start = [(1 - share[axis]) * place[axis] for axis in (0, 1)]
    if unscaled:
        start = [round(start[axis] * size[axis]) / size[axis] for axis in (0, 1)]
    return start[0], start[1], start[0] + share[0], start[1] + share[1]


def same_aspect(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two sizes are one picture at two scales, as 512x341 and 1024x683 are.

    Scaled to the smaller one's longer side, the other side may be off by the one pixel that rounding takes or gives.
    More would be a stretch, which drifts from one end of the picture to the other.
    """
    small, large = sorted((first, second), key=lambda size: size[0] * size[1])
    long, short = (0, 1) if large[0] >= large[1] else (1, 0)
    return abs(small[long] * large[short] - small[short] * large[long]) <= large[long]


def region_size(size: tuple[int, int], region: Box) -> tuple[float, float]:
    """Size in pixels of a part of a picture."""
    return size[0] * (region[2] - region[0]), size[1] * (region[3] - region[1])


def fitted(image: Image.Image, frame: tuple[float, float], how: str, background: str) -> Image.Image:
    """The picture brought to the aspect of a frame (width, height) by cropping or padding around its centre."""
    width, height = image.size
    aspect = frame[0] / frame[1]
    if same_aspect(image.size, frame):
        return image
    if how == "crop":
        size = (min(width, round(height * aspect)), min(height, round(width / aspect)))
        return ImageOps.fit(image, size)
    size = (max(width, round(height * aspect)), max(height, round(width / aspect)))
    colour = ImageColor.getrgb(background)[:3] if image.mode == "RGB" else 0
    canvas = Image.new(image.mode, size, colour)
    canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def cut(image: Image.Image, geometry: Geometry, interpolation: str | None, region: Box = WHOLE) -> Image.Image:
    """The item's pixels of one picture, which is ``region`` of ``image``. One resampling step."""
    width, height = image.size
    left, top, right, bottom = region
    across, down = right - left, bottom - top
    x0, y0, x1, y1 = geometry.box
    box = (
        (left + x0 * across) * width, (top + y0 * down) * height,
        (left + x1 * across) * width, (top + y1 * down) * height,
    )  # fmt: skip
    size = (geometry.width, geometry.height)
    shrinks = (box[2] - box[0]) * (box[3] - box[1]) > size[0] * size[1]
    filter_name = interpolation or ("area" if shrinks else "lanczos")
    if size == image.size and box == (0, 0, width, height):
        made = image
    else:
        made = image.resize(size, RESAMPLING[filter_name], box=tuple(np.clip(box, 0, (width, height) * 2)))
    return ImageOps.mirror(made) if geometry.flip else made
