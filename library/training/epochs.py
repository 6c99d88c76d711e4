"""Which items every micro-step of an epoch spans, over all processes, and which of them are this process's.

A micro-step's items come from one bucket and count `batch_size` for each process, so an epoch on two processes is the
epoch of one process with twice the batch. If the number of processes changes inside an epoch, what is left of it is cut
anew: no item is lost, none comes twice.
"""

from dataclasses import dataclass, replace

from library.data.order import Member, Order
from library.flow import draws


@dataclass(frozen=True)
class Group:
    """The items of one micro-step over all processes (numbers of members), and which resolution they are drawn at."""

    epoch: int
    items: tuple[int, ...]
    size: int
    batch_size: int

    @property
    def num_items(self) -> int:
        """Items over all processes."""
        return len(self.items)


@dataclass(frozen=True)
class Share:
    """The part of a group that one process computes. `first`: the place of its first item in the group.

    counts: False for a process that got no item, because the group is smaller than the number of processes: it computes
    an item that is not its own with a weight of zero, since the others wait for it.
    """

    items: tuple[int, ...]
    first: int
    counts: bool = True


Segments = list[list[int]]
"""[[processes, micro-steps done], ...]: how the present epoch was cut before the present cut."""


class Epochs:
    """Epochs over fixed members on `processes` processes. `earlier` belongs to `epoch`, the one a run continues in."""

    def __init__(
        self, members: list[Member], seed: int, processes: int, epoch: int = 0, earlier: Segments | None = None
    ):
        self.members = members
        self.seed = seed
        self.processes = processes
        self._cut_epoch = epoch
        self._earlier = [segment for segment in earlier or [] if segment[1]]
        self._orders: dict[int, Order] = {}
        self._last: tuple[int, list[Group]] | None = None

    def groups(self, epoch: int) -> list[Group]:
        """Every micro-step of an epoch; of the continued epoch, those since its last cut."""
        if self._last is None or self._last[0] != epoch:
            segments = self._earlier if epoch == self._cut_epoch else []
            self._last = (epoch, self._groups(epoch, segments))
        return self._last[1]

    def segments(self, epoch: int, position: int) -> Segments:
        """How `epoch` was cut so far, for a state folder; `position` micro-steps of the present cut are done."""
        earlier = self._earlier if epoch == self._cut_epoch else []
        return [*earlier, [self.processes, position]]

    def _groups(self, epoch: int, segments: Segments) -> list[Group]:
        if not segments:
            return self._uncut(epoch, self.processes)
        first, *later = segments
        left = self._uncut(epoch, first[0])[first[1] :]
        for number, (processes, done) in enumerate([*later, [self.processes, 0]], start=1):
            left = self._cut_anew(left, processes, number)[done:]
        return left

    def _uncut(self, epoch: int, processes: int) -> list[Group]:
        order = self._order(processes)
        plans = [order.batch(order.start(epoch) + position) for position in range(order.num_batches(epoch))]
        return [Group(epoch, plan.items, plan.size, self.members[plan.items[0]].batch_size) for plan in plans]

    def _order(self, processes: int) -> Order:
        if processes not in self._orders:
            widened = [replace(member, batch_size=member.batch_size * processes) for member in self.members]
            self._orders[processes] = Order(widened, self.seed)
        return self._orders[processes]

    def _cut_anew(self, left: list[Group], processes: int, number: int) -> list[Group]:
        """The items of `left` in groups for another number of processes; items keep their resolution."""
        pools: dict[tuple, list[int]] = {}
        for group in left:
            pools.setdefault((repr(self.members[group.items[0]].group), group.size), []).extend(group.items)
        made = []
        for (_, size), items in sorted(pools.items()):
            batch_size = self.members[items[0]].batch_size
            span = batch_size * processes
            made += [
                Group(left[0].epoch, tuple(items[start : start + span]), size, batch_size)
                for start in range(0, len(items), span)
            ]
        if not made:
            return made
        order = draws.permutation(len(made), self.seed, "cut", left[0].epoch, number, processes)
        return [made[index] for index in order]


def share(group: Group, rank: int, processes: int) -> Share:
    """What process `rank` computes of a group: equal, contiguous parts; the last ones may be smaller."""
    each = -(-group.num_items // processes)
    start = rank * each
    items = group.items[start : start + each]
    return Share(items, start) if items else Share(group.items[:1], 0, counts=False)
