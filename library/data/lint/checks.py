"""The checks of one item: what it is cut from, what differs in its pair, what its masks cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from library.data.lint.findings import Finding
from library.data.lint.shift import global_shift
from library.data.pairs import Pair
from library.data.pictures import CHANGE_THRESHOLD, Pictures, cell_means
from library.data.plan import PlannedItem

SAME = 6.0  # of 255: where no cell's mean differs by more, a pair is one picture, saved twice
CHANGED = 10.0  # of 255: a cell whose mean differs by more was changed; compression and noise leave means alone
FEWEST_CHANGED = 1e-3  # of the cells: less change says nothing about where it belongs
MOST_OUTSIDE = 0.1  # of the change may lie outside the mask
MOST_CROPPED = 0.25  # of the picture's area
MOST_ENLARGED = 1.5


@dataclass(frozen=True)
class Difference:
    """How a target differs from its source. share: of pixels, above the cache's threshold; mean: of 255.

    cells: (H/8, W/8), how far the means of each latent cell are apart, of 255, in the channel that differs most.
    """

    share: float
    mean: float
    cells: np.ndarray

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray) -> Difference:
        """Between two pictures (H, W, 3) uint8."""
        apart = source.astype(np.int16) - target
        share = (np.abs(apart).max(axis=2) > CHANGE_THRESHOLD).mean()
        cells = np.max([np.abs(cell_means(apart[..., channel])) for channel in range(3)], axis=0)
        return cls(float(share), float(np.abs(apart).mean()), cells)

    @property
    def is_none(self) -> bool:
        """Whether it is no more than what saving a picture again does to it."""
        return float(self.cells.max()) <= SAME


def check_geometry(item: PlannedItem) -> Iterator[Finding]:
    """Pictures that are cut or enlarged more than is good, at any of the resolutions."""
    worst = max(item.recipes, key=lambda recipe: recipe.crop_share)
    if worst.crop_share > MOST_CROPPED:
        width, height = worst.pair.frame
        geometry = worst.geometry
        message = (
            f"{worst.crop_share:.0%} of {width:g}x{height:g} is cut away for the bucket "
            f"{geometry.width}x{geometry.height}"
        )
        yield Finding(item.key, "cropped", message, {"share": round(worst.crop_share, 4)})
    for role in ("target", "source"):
        recipe = max(item.recipes, key=lambda recipe: recipe.enlargement)
        picture = getattr(recipe.pair, role)
        if picture is None:
            continue
        scale = recipe.enlargement * max(recipe.pair.frame[axis] / picture.size[axis] for axis in (0, 1))
        if scale > MOST_ENLARGED:
            size = f"{picture.size[0]:g}x{picture.size[1]:g}"
            message = f"{role} of {size} is enlarged {scale:.2f} times"
            yield Finding(item.key, "enlarged", message, {"scale": round(scale, 3), "picture": role})
            return


def check_pair(key: str, pictures: Pictures, difference: Difference) -> Iterator[Finding]:
    """Pairs that are one picture, or the same picture moved."""
    if difference.is_none:
        exact = "they are equal" if difference.mean == 0 else f"mean difference {difference.mean:.2f} of 255"
        yield Finding(key, "identical", f"source and target are the same ({exact})", {"mean": difference.mean})
        return
    assert pictures.target is not None
    shift = global_shift(*(np.asarray(picture.convert("L")) for picture in (pictures.source, pictures.target)))
    if shift is not None:
        yield Finding(
            key,
            "shifted",
            f"target lies {shift.x:+.1f} pixels to the right and {shift.y:+.1f} down of its source "
            f"(at {pictures.source.width}x{pictures.source.height})",
            {"x": round(shift.x, 2), "y": round(shift.y, 2), "agreement": round(shift.agreement, 3)},
        )


def check_masks(pair: Pair, masks: list[np.ndarray], difference: Difference | None) -> Iterator[Finding]:
    """Masks that say nothing, and masks that leave out what changes. masks: the pair's, bool (H, W); drawn ones too,
    but none that is full because the user asked for it."""
    if pair.mask is not None and (text := _constant(pair, masks)):
        yield Finding(pair.key, "constant_mask", text)
    if difference is None:
        return
    changed = difference.cells > CHANGED
    if changed.mean() < FEWEST_CHANGED:
        return
    outside = max((_outside(mask, changed) for mask in masks if mask.any() and not mask.all()), default=0.0)
    if outside > MOST_OUTSIDE:
        message = f"{outside:.0%} of what changes lies outside the mask"
        yield Finding(pair.key, "mask_misses_change", message, {"outside": round(outside, 4)})


def _constant(pair: Pair, masks: list[np.ndarray]) -> str | None:
    """What is wrong with a mask of one value, in its file or after the crop."""
    assert pair.mask is not None
    facts = pair.mask.facts
    if pair.mask is not pair.source and facts.white in (0.0, 1.0):
        hidden = "; its alpha channel is not used" if facts.has_alpha else ""
        return f"the mask file is all {'white' if facts.white else 'black'}{hidden}"
    constant = next((mask for mask in masks if mask.all() or not mask.any()), None)
    if constant is None:
        return None
    return f"the mask, cut to its bucket, is all {'white' if constant.all() else 'black'}"


def _outside(mask: np.ndarray, changed: np.ndarray) -> float:
    """The share of the changed cells (H/8, W/8) that the mask (H, W) does not touch, nor any of their neighbours."""
    touched = np.pad(cell_means(mask.astype(np.float32)) > 0, 1)
    height, width = changed.shape
    near = np.zeros_like(changed)
    for down in range(3):
        for across in range(3):
            near |= touched[down : down + height, across : across + width]
    return float((changed & ~near).sum() / changed.sum())
