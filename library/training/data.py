"""The data as the loop sees it: windows of micro-steps, each with the batches that are this process's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from library.data.batches import Batch, prefetched
from library.data.cached import CachedDataset
from library.data.order import BatchPlan
from library.training.epochs import Epochs, Group, share
from library.training.objective import Place
from library.training.processes import World
from library.training.progress import Progress

LEAST_AHEAD = 2  # batches read ahead in any case: reading one takes a small part of a step


@dataclass(frozen=True)
class Micro:
    """One forward pass: a batch, its place among all processes' items, and 0 for a batch that only keeps company."""

    batch: Batch
    place: Place
    counts: bool


@dataclass(frozen=True)
class Window:
    """The micro-steps whose gradients make one optimizer step. The last one of an epoch may be shorter."""

    groups: tuple[Group, ...]
    micros: Iterator[Micro]

    @property
    def num_items(self) -> int:
        """Items over all micro-steps and processes: what the gradient is averaged over."""
        return sum(group.num_items for group in self.groups)


class TrainingData:
    """A cached data set, cut into epochs for this process.

    on_read: called with every batch and its place as soon as it is read, in the thread that reads ahead.
    """

    def __init__(self, dataset: CachedDataset, epochs: Epochs, world: World, ahead: int = 0):
        self.dataset, self.epochs, self.world = dataset, epochs, world
        self.ahead = max(LEAST_AHEAD, ahead)
        self.on_read: Callable[[Batch, Place], None] | None = None

    def windows(self, progress: Progress, accumulation: int) -> Iterator[Window]:
        """What is left of the present epoch, read ahead in the background."""
        groups = self.epochs.groups(progress.epoch)[progress.position :]
        first = progress.micro_step
        shares = [share(group, self.world.rank, self.world.size) for group in groups]

        all_places = [Place(first + i, shares[i].first, group.num_items) for i, group in enumerate(groups)]

        def load(index: int) -> Batch:
            group = groups[index]
            batch = self.dataset.read(BatchPlan(first + index, group.epoch, shares[index].items, group.size))
            if self.on_read is not None:
                self.on_read(batch, all_places[index])
            return batch

        batches = prefetched(load, range(len(groups)), self.ahead)
        try:
            for start in range(0, len(groups), accumulation):
                chosen = range(start, min(start + accumulation, len(groups)))
                micros = (Micro(next(batches), all_places[i], shares[i].counts) for i in chosen)
                yield Window(tuple(groups[i] for i in chosen), micros)
        finally:
            batches.close()

    def is_last(self, progress: Progress) -> bool:
        """Whether no micro-step of the present epoch is left."""
        return progress.position >= len(self.epochs.groups(progress.epoch))

    def names(self, window: Window) -> list[str]:
        """The items of a window, to tell the user."""
        return sorted({self.dataset.items[item].key for group in window.groups for item in group.items})

    def steps_left(self, progress: Progress, accumulation: int, num_epochs: int) -> int:
        """Optimizer steps until `num_epochs` epochs are done."""
        steps = 0
        for epoch in range(progress.epoch, num_epochs):
            count = len(self.epochs.groups(epoch)) - (progress.position if epoch == progress.epoch else 0)
            steps += -(-count // accumulation)
        return steps
