"""All checks over a plan. Pictures are decoded in threads, once each, at the first size they are cached in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from library.data.lint.checks import Difference, check_geometry, check_masks, check_pair
from library.data.lint.duplicates import Look, check_duplicates, thumbnails
from library.data.lint.findings import KINDS, Finding
from library.data.pairs import Picture
from library.data.pictures import pictures_of
from library.data.plan import Plan, PlannedItem

SHOWN_WORDS = 120  # letters


@dataclass(frozen=True)
class Examined:
    """A data set after a look at every item. changed: by item, the share of its pixels that the edit changes."""

    findings: tuple[Finding, ...]
    changed: dict[str, float]


def examine(
    plan: Plan,
    lost: Mapping[str, str] | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> Examined:
    """Check every item of a plan. lost: words that T5 does not see, by caption.

    Raises DataError if a file was changed since the plan was made.
    """
    changed: dict[str, float] = {}
    findings: list[Finding] = []
    looks: list[Look] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for item, (found, share, look) in zip(plan.items, pool.map(_examined, plan.items), strict=True):
            findings += [*found, *_check_captions(item, lost or {})]
            looks.append(look)
            if share is not None:
                changed[item.key] = share
            progress(1)
    findings += check_duplicates([item.key for item in plan.items], looks)
    order = {item.key: number for number, item in enumerate(plan.items)}
    ranks = {kind: number for number, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: (ranks[finding.kind], order[finding.item]))
    return Examined(tuple(findings), changed)


def _examined(item: PlannedItem) -> tuple[list[Finding], float | None, Look]:
    """Findings, share of changed pixels, and look of one item."""
    recipe = next(item.recipes)
    pair = recipe.pair
    pictures = pictures_of(recipe)
    findings = list(check_geometry(item))
    difference = None
    if pictures.target is not None:
        difference = Difference.of(np.asarray(pictures.source), np.asarray(pictures.target))
        findings += check_pair(item.key, pictures, difference)
    masks = pictures.masks[:-1] if recipe.look.masks.with_full else pictures.masks
    given = pair.mask is not None
    findings += check_masks(pair, masks, difference)
    files = tuple(_identity(picture) for picture in (pair.source, pair.target, pair.mask))
    look = Look((recipe.mode.name, given), files, thumbnails(pictures, with_mask=given and bool(masks)))
    return findings, None if difference is None else difference.share, look


def _identity(picture: Picture | None) -> tuple | None:
    return None if picture is None else (picture.known.sha256, picture.region)


def _check_captions(item: PlannedItem, lost: Mapping[str, str]) -> list[Finding]:
    for caption in item.captions:
        if caption in lost:
            words = lost[caption]
            shown = words if len(words) <= SHOWN_WORDS else words[: SHOWN_WORDS - 3] + "..."
            return [Finding(item.key, "long_caption", f'T5 does not see "{shown}"', {"lost": words})]
    return []
