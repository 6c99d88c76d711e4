"""Which items make up which batch: a pure function of the seed and the epoch.

Position p is the p-th batch of the run, whoever asks for it and whenever; so resuming, prefetching and any number of
processes see one order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from library.flow import draws


@dataclass(frozen=True)
class Member:
    """An item as the order sees it. repeats: how often it comes in an epoch, on average.

    group: items of one group may share a batch: same data set, same size at every resolution.
    """

    key: str
    repeats: float
    group: tuple
    batch_size: int
    num_sizes: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch: numbers of its items, and which resolution it draws."""

    position: int
    epoch: int
    items: tuple[int, ...]
    size: int


class Order:
    """The endless sequence of batches over fixed members."""

    def __init__(self, members: list[Member], seed: int):
        assert members, "an order of nothing"
        self.members = members
        self.seed = seed
        self._starts = [0]
        self._epoch: tuple[int, list[tuple[tuple[int, ...], int]]] | None = None

    def num_batches(self, epoch: int) -> int:
        """Batches in an epoch. Partial batches are kept: no item is lost."""
        self._find(epoch)
        return self._starts[epoch + 1] - self._starts[epoch]

    def start(self, epoch: int) -> int:
        """Position of an epoch's first batch."""
        if epoch:
            self._find(epoch - 1)
        return self._starts[epoch]

    def epoch_of(self, position: int) -> int:
        """The epoch that a position lies in."""
        while self._starts[-1] <= position:
            self._find(len(self._starts) - 1)
        epoch = len(self._starts) - 1
        while self._starts[epoch] > position:
            epoch -= 1
        return epoch

    def batch(self, position: int) -> BatchPlan:
        """The batch at a position."""
        epoch = self.epoch_of(position)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        items, size = self._epoch[1][position - self._starts[epoch]]
        return BatchPlan(position, epoch, items, size)

    def _find(self, epoch: int) -> None:
        while len(self._starts) <= epoch + 1:
            counted = sum(
                -(-sum(times for _, times in group) // self.members[group[0][0]].batch_size)
                for group in self._groups(len(self._starts) - 1).values()
            )
            self._starts.append(self._starts[-1] + counted)

    def _groups(self, epoch: int) -> dict[tuple, list[tuple[int, int]]]:
        """(item, times) of an epoch by group. The fraction of a repeat is a coin tossed anew in each epoch."""
        groups: dict[tuple, list[tuple[int, int]]] = {}
        for number, member in enumerate(self.members):
            times = int(member.repeats)
            rest = member.repeats - times
            if rest and draws.uniform(self.seed, "repeat", epoch, member.key) < rest:
                times += 1
            if times:
                groups.setdefault(member.group, []).append((number, times))
        return groups

    def _batches(self, epoch: int) -> list[tuple[tuple[int, ...], int]]:
        batches = []
        for group, counted in sorted(self._groups(epoch).items(), key=lambda entry: repr(entry[0])):
            items = [number for number, times in counted for _ in range(times)]
            shuffled = [items[index] for index in draws.permutation(len(items), self.seed, "order", epoch, repr(group))]
            size = self.members[items[0]].batch_size
            batches += [tuple(shuffled[start : start + size]) for start in range(0, len(shuffled), size)]
        order = draws.permutation(len(batches), self.seed, "batches", epoch)
        drawn = []
        for place, index in enumerate(order):
            num_sizes = self.members[batches[index][0]].num_sizes
            drawn.append((batches[index], draws.choice(num_sizes, self.seed, "resolution", epoch, place)))
        return drawn


def occurrences(keys: tuple[str, ...]) -> tuple[int, ...]:
    """For each key, how many equal ones come before it: an item that comes twice in a batch is drawn twice."""
    seen: Counter[str] = Counter()
    counted = []
    for key in keys:
        counted.append(seen[key])
        seen[key] += 1
    return tuple(counted)
