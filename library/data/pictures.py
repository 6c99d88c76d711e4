"""A recipe's pictures: files decoded and cut alike, before any of them becomes a tensor.

What is encoded and what --lint looks at are these same pixels. Imports no torch. Safe in several threads: Pillow and
NumPy let go of Python's lock while they work.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from PIL import Image

from library.data.geometry import WHOLE, cut, fitted, same_aspect
from library.data.images import read_alpha, read_mask, read_rgb
from library.data.masks import variants
from library.data.pairs import Picture
from library.data.recipe import Recipe
from library.errors import DataError

CHANGE_THRESHOLD = 16  # of 255: JPEG's own noise stays below it
CELL = 8  # pixels of one latent


@dataclass(frozen=True)
class Pictures:
    """An item's pictures at their final size. masks: bool (H, W), one for each condition variant; none if its mode
    makes them itself."""

    source: Image.Image
    target: Image.Image | None
    masks: list[np.ndarray]


def pictures_of(recipe: Recipe) -> Pictures:
    """Decode and cut everything a recipe names. Raises DataError if a file changed since it was looked at."""
    pair = recipe.pair
    source = _cut(recipe, pair.source)
    target = _cut(recipe, pair.target) if pair.target is not None else None
    return Pictures(source, target, _masks(recipe))


def changed_cells(source: Image.Image, target: Image.Image) -> np.ndarray:
    """(H/8, W/8) float32: the share of pixels in each cell that differ by more than the threshold in any channel."""
    first, second = (np.asarray(image, dtype=np.int16) for image in (source, target))
    differs = (np.abs(first - second).max(axis=2) > CHANGE_THRESHOLD).astype(np.float32)
    return cell_means(differs)


def cell_means(values: np.ndarray) -> np.ndarray:
    """(H, W) -> (H/8, W/8): the mean of each latent cell."""
    height, width = values.shape
    return values.reshape(height // CELL, CELL, width // CELL, CELL).mean(axis=(1, 3), dtype=np.float32)


def read_bytes(picture: Picture) -> bytes:
    """The bytes of a picture's file. Raises DataError if they are no longer those that were looked at."""
    try:
        data = picture.blob.read()
    except OSError as error:
        raise DataError(f"{picture.blob.name} cannot be read any more ({error.strerror or error})") from error
    if sha256(data).hexdigest() != picture.known.sha256:
        raise DataError(f"{picture.blob.name} was changed while it was being cached: run influx_cache.py again")
    return data


def _cut(recipe: Recipe, picture: Picture) -> Image.Image:
    look = recipe.look
    image = read_rgb(read_bytes(picture), look.max_pixels, _background(recipe, picture))
    frame = recipe.pair.frame
    region = picture.region
    if not same_aspect(picture.size, frame):
        image = fitted(_part(image, picture), frame, look.mismatch, look.background)
        region = WHOLE
    return cut(image, recipe.geometry, look.interpolation, region)


def _background(recipe: Recipe, picture: Picture) -> str | None:
    """Where transparency is the mask, the picture's colours under it are wanted."""
    return None if recipe.pair.mask is picture else recipe.look.background


def _part(image: Image.Image, picture: Picture) -> Image.Image:
    left, top, right, bottom = picture.region
    return image.crop(
        (round(left * image.width), round(top * image.height), round(right * image.width), round(bottom * image.height))
    )


def _masks(recipe: Recipe) -> list[np.ndarray]:
    look, pair = recipe.look, recipe.pair
    if "mask" not in recipe.mode.takes or (pair.mask is None and not look.masks.kinds):
        return []
    size = (recipe.geometry.width, recipe.geometry.height)
    grey = None if pair.mask is None else _grey(recipe, pair.mask)
    masks = variants(grey, size, pair.source.known.sha256, look.masks)
    if grey is None and recipe.geometry.flip:
        masks = [np.ascontiguousarray(mask[:, ::-1]) for mask in masks]
    return masks


def _grey(recipe: Recipe, mask: Picture) -> Image.Image:
    read = read_alpha if mask is recipe.pair.source else read_mask
    grey = read(read_bytes(mask), recipe.look.max_pixels)
    frame = recipe.pair.frame
    region = mask.region
    if not same_aspect(mask.size, frame) and not same_aspect(recipe.pair.source.size, frame):
        grey = fitted(_part(grey, mask), frame, recipe.look.mismatch, recipe.look.background)
        region = WHOLE
    return cut(grey, recipe.geometry, "bilinear", region)
