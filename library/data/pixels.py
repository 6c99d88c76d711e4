"""A recipe's pixels as tensors: its pictures made into the items that its mode asks for.

Runs in worker threads of the caching command.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from library.conditioning import MODES, Images
from library.conditioning.item import Item
from library.data.geometry import cut
from library.data.images import MASK_THRESHOLD, read_mask, read_rgb
from library.data.pictures import changed_cells, pictures_of, read_bytes
from library.data.previews import PlannedPreview
from library.data.recipe import Recipe


@dataclass(frozen=True)
class ItemPixels:
    """What will be encoded. items share their target. changed: (h, w) uint8, how much of each latent cell differs
    between source and target (255 = all of it); None if there are not two pictures."""

    items: list[Item]
    changed: Tensor | None


def item_pixels(recipe: Recipe) -> ItemPixels:
    """Decode and cut everything a recipe names. Raises DataError if a file changed since it was looked at."""
    pictures = pictures_of(recipe)
    images = Images(
        to_tensor(pictures.source),
        None if pictures.target is None else to_tensor(pictures.target),
        tuple(torch.from_numpy(mask).float()[None] for mask in pictures.masks),
    )
    items = recipe.mode.items(images, recipe.look.settings)
    if pictures.target is None:
        return ItemPixels(items, None)
    shares = np.round(changed_cells(pictures.source, pictures.target) * 255).astype(np.uint8)
    return ItemPixels(items, torch.from_numpy(shares).repeat(1, recipe.mode.pictures_across))


def preview_item(preview: PlannedPreview) -> Item:
    """The condition of a preview; one without an image is painted from the prompt alone."""
    geometry = preview.geometry
    if preview.image is None:
        blank = torch.zeros(3, geometry.height, geometry.width)
        return MODES[preview.mode].request(blank, torch.ones(1, geometry.height, geometry.width), preview.settings)
    whole = read_rgb(read_bytes(preview.image), preview.max_pixels, preview.background)
    image = cut(whole, geometry, None, preview.image.region)
    mask = None
    if preview.mask is not None:
        grey = cut(read_mask(read_bytes(preview.mask), preview.max_pixels), geometry, "bilinear")
        grey = ImageChops.invert(grey) if preview.inverted else grey
        mask = torch.from_numpy(np.asarray(grey) >= MASK_THRESHOLD).float()[None]
    return MODES[preview.mode].request(to_tensor(image), mask, preview.settings)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
