"""A recipe's pixels: files decoded, cut alike, made into the items its mode asks for.

Runs in worker threads of the caching command (Pillow and NumPy let go of Python's lock while they work).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.conditioning import MODES, Images
from library.conditioning.item import Item
from library.data.geometry import cut, fitted, same_aspect
from library.data.images import MASK_THRESHOLD, read_alpha, read_mask, read_rgb
from library.data.masks import variants
from library.data.pairs import Picture
from library.data.previews import PlannedPreview
from library.data.recipe import Recipe
from library.errors import DataError

CHANGE_THRESHOLD = 16  # of 255: JPEG's own noise stays below it
WHITE = "#ffffff"
CELL = 8  # pixels of one latent


@dataclass(frozen=True)
class ItemPixels:
    """What will be encoded. items share their target. changed: (h, w) uint8, how much of each latent cell differs
    between source and target (255 = all of it); None if there are not two pictures."""

    items: list[Item]
    changed: Tensor | None


def item_pixels(recipe: Recipe) -> ItemPixels:
    """Decode and cut everything a recipe names. Raises DataError if a file changed since it was looked at."""
    pair = recipe.pair
    source = _cut(recipe, pair.source)
    target = _cut(recipe, pair.target) if pair.target is not None else None
    images = Images(
        to_tensor(source),
        None if target is None else to_tensor(target),
        tuple(torch.from_numpy(mask).float()[None] for mask in _masks(recipe)),
    )
    items = recipe.mode.items(images, recipe.look.settings)
    changed = None if target is None else changed_cells(source, target)
    if changed is not None and recipe.mode.pictures_across > 1:
        changed = changed.repeat(1, recipe.mode.pictures_across)
    return ItemPixels(items, changed)


def preview_item(preview: PlannedPreview) -> Item:
    """The condition of a preview; one without an image is painted from the prompt alone."""
    geometry = preview.geometry
    if preview.image is None:
        blank = torch.zeros(3, geometry.height, geometry.width)
        return MODES[preview.mode].request(blank, torch.ones(1, geometry.height, geometry.width), preview.settings)
    image = cut(read_rgb(_bytes(preview.image), preview.max_pixels, WHITE), geometry, None)
    mask = None
    if preview.mask is not None:
        grey = cut(read_mask(_bytes(preview.mask), preview.max_pixels), geometry, "bilinear")
        mask = torch.from_numpy(np.asarray(grey) >= MASK_THRESHOLD).float()[None]
    return MODES[preview.mode].request(to_tensor(image), mask, preview.settings)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def changed_cells(source: Image.Image, target: Image.Image) -> Tensor:
    """(H/8, W/8) uint8: the share of pixels in each cell that differ by more than the threshold in any channel."""
    first, second = (np.asarray(image, dtype=np.int16) for image in (source, target))
    differs = (np.abs(first - second).max(axis=2) > CHANGE_THRESHOLD).astype(np.float32)
    height, width = differs.shape
    shares = differs.reshape(height // CELL, CELL, width // CELL, CELL).mean(axis=(1, 3))
    return torch.from_numpy(np.round(shares * 255).astype(np.uint8))


def _cut(recipe: Recipe, picture: Picture) -> Image.Image:
    look = recipe.look
    image = read_rgb(_bytes(picture), look.max_pixels, _background(recipe, picture))
    frame = recipe.pair.frame
    region = picture.region
    if not same_aspect(picture.size, frame):
        image = fitted(_part(image, picture), frame[0] / frame[1], look.mismatch, look.background)
        region = (0.0, 0.0, 1.0, 1.0)
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
    grey = read(_bytes(mask), recipe.look.max_pixels)
    frame = recipe.pair.frame
    region = mask.region
    if not same_aspect(mask.size, frame):
        grey = fitted(_part(grey, mask), frame[0] / frame[1], recipe.look.mismatch, recipe.look.background)
        region = (0.0, 0.0, 1.0, 1.0)
    return cut(grey, recipe.geometry, "bilinear", region)


def _bytes(picture: Picture) -> bytes:
    try:
        data = picture.blob.read()
    except OSError as error:
        raise DataError(f"{picture.blob.name} cannot be read any more ({error.strerror or error})") from error
    if sha256(data).hexdigest() != picture.known.sha256:
        raise DataError(f"{picture.blob.name} was changed while it was being cached: run influx_cache.py again")
    return data
