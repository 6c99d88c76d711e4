"""How often each subset's items come: repeats, weights and regularisation, as shares of an epoch; and which items are
held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from library.config.tables import DatasetTable, SubsetTable
from library.errors import ConfigError
from library.flow import draws


class Item(Protocol):
    """A planned or a cached item."""

    @property
    def key(self) -> str: ...

    @property
    def subset(self) -> int: ...


@dataclass(frozen=True)
class Share:
    """A subset's part of an epoch. repeats: how often each item comes on average; share: of all items drawn."""

    name: str
    num_items: int
    repeats: float
    share: float


def shares(names: Sequence[str], subsets: Sequence[SubsetTable], counts: Sequence[int]) -> list[Share]:
    """The share of each subset, from its items in training.

    Weighted subsets come in proportion to their weights, and no item less than once. Regularisation items together come
    as often as all others, as in kohya's scripts. Raises ConfigError if only some subsets have a weight.
    """
    repeats = _weighted(subsets, counts) if _are_weighted(names, subsets, counts) else _repeated(subsets)
    repeats = _balanced(repeats, subsets, counts)
    draws = [repeat * count for repeat, count in zip(repeats, counts, strict=True)]
    total = sum(draws) or 1.0
    return [Share(*values) for values in zip(names, counts, repeats, [draw / total for draw in draws], strict=True)]


def _are_weighted(names: Sequence[str], subsets: Sequence[SubsetTable], counts: Sequence[int]) -> bool:
    used = [number for number, subset in enumerate(subsets) if counts[number] and not subset.is_reg]
    weighted = [number for number in used if subsets[number].subset_weight is not None]
    if weighted and len(weighted) < len(used):
        without = ", ".join(names[number] for number in used if number not in weighted)
        raise ConfigError(f"subset_weight is set for some subsets and not for {without}: set it for all or for none")
    return bool(weighted)


def _weighted(subsets: Sequence[SubsetTable], counts: Sequence[int]) -> list[float]:
    raw = [
        (subset.subset_weight or 0.0) / count if count and not subset.is_reg else 0.0
        for subset, count in zip(subsets, counts, strict=True)
    ]
    least = min(value for value in raw if value)
    return [value / least if value else float(subset.num_repeats) for value, subset in zip(raw, subsets, strict=True)]


def _repeated(subsets: Sequence[SubsetTable]) -> list[float]:
    return [float(subset.num_repeats) for subset in subsets]


def _balanced(repeats: list[float], subsets: Sequence[SubsetTable], counts: Sequence[int]) -> list[float]:
    drawn = [repeat * count for repeat, count in zip(repeats, counts, strict=True)]
    trained = sum(draw for draw, subset in zip(drawn, subsets, strict=True) if not subset.is_reg)
    regular = sum(draw for draw, subset in zip(drawn, subsets, strict=True) if subset.is_reg)
    if not regular or not trained:
        return repeats
    return [
        repeat * trained / regular if subset.is_reg else repeat for repeat, subset in zip(repeats, subsets, strict=True)
    ]


def share_table(found: list[Share]) -> str:
    """The shares as lines for people."""
    found = [share for share in found if share.num_items] or found
    width = max(len(share.name) for share in found)
    lines = [
        f"  {share.name:<{width}}  {share.num_items:>6} items x {share.repeats:g} repeats = {share.share:6.1%}"
        for share in found
    ]
    return "\n".join(lines)


def trained_counts(items: Sequence[Item], datasets: Sequence[DatasetTable], seed: int) -> list[int]:
    """How many items of each subset are trained on, by the subset's number."""
    held = held_out(items, datasets, seed)
    counts = [0] * sum(len(dataset.subsets) for dataset in datasets)
    for item in items:
        counts[item.subset] += item.key not in held
    return counts


def held_out(items: Sequence[Item], datasets: Sequence[DatasetTable], seed: int) -> set[str]:
    """Keys of the items kept for validation: whole subsets, and a share of each data set."""
    kept: set[str] = set()
    first = 0
    for dataset in datasets:
        numbers = range(first, first + len(dataset.subsets))
        first += len(dataset.subsets)
        own = {number for number in numbers if dataset.subsets[number - numbers.start].is_validation}
        kept |= {item.key for item in items if item.subset in own}
        rest = [
            item.key
            for item in items
            if item.subset in numbers and item.subset not in own
            and not dataset.subsets[item.subset - numbers.start].is_reg
        ]  # fmt: skip
        split_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        if dataset.validation_split:
            rest.sort(key=lambda key: draws.uniform(split_seed, "held out", key))
            kept |= set(rest[: round(len(rest) * dataset.validation_split)])
    return kept
