"""Every item once, whatever the number of processes and whenever it changes; two processes are a doubled batch."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.order import Member
from library.training.epochs import Epochs, share


def members(count: int = 23, batch_size: int = 2) -> list[Member]:
    """Items of three buckets with repeats and two resolutions."""
    return [Member(f"item{i}", 1 + i % 2, ("bucket", i % 3), batch_size, 2) for i in range(count)]


def expected(listed: list[Member]) -> Counter:
    """How often every item must come."""
    return Counter({number: int(member.repeats) for number, member in enumerate(listed)})


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_an_epoch_has_every_item_of_one_bucket_per_group(processes):
    """Nothing dropped, nothing doubled, one shape per micro-step."""
    listed = members()
    groups = Epochs(listed, 7, processes).groups(3)
    assert Counter(item for group in groups for item in group.items) == expected(listed)
    for group in groups:
        assert len({listed[item].group for item in group.items}) == 1
        assert group.num_items <= 2 * processes
        shares = [share(group, rank, processes) for rank in range(processes)]
        assert sum((s.items for s in shares if s.counts), ()) == group.items
        assert all(1 <= len(s.items) <= 2 for s in shares)
        assert [s.first for s in shares if s.counts] == [
            sum(len(s.items) for s in shares[:rank]) for rank in range(sum(s.counts for s in shares))
        ]


def test_two_processes_are_one_with_twice_the_batch():
    """The same groups in the same order."""
    listed = members()
    double = [replace(member, batch_size=2 * member.batch_size) for member in listed]
    two, one = Epochs(listed, 7, 2).groups(1), Epochs(double, 7, 1).groups(1)
    assert [(g.items, g.size) for g in two] == [(g.items, g.size) for g in one]


def test_epochs_differ_and_are_repeatable():
    """A pure function of seed and epoch."""
    listed = members()
    assert Epochs(listed, 7, 1).groups(2) == Epochs(listed, 7, 1).groups(2)
    assert Epochs(listed, 7, 1).groups(2) != Epochs(listed, 7, 1).groups(3)
    assert Epochs(listed, 7, 1).groups(2) != Epochs(listed, 8, 1).groups(2)


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=4),
    processes=st.integers(1, 4),
    batch_size=st.integers(1, 3),
)
def test_changing_the_number_of_processes_loses_and_doubles_nothing(changes, processes, batch_size):
    """A run that is stopped and continued on other machines, several times in one epoch."""
    listed = members(batch_size=batch_size)
    seen: Counter = Counter()
    segments: list = []
    for number, done in changes:
        epochs = Epochs(listed, 7, number, epoch=1, earlier=segments)
        groups = epochs.groups(1)
        done = min(done, len(groups))
        seen.update(item for group in groups[:done] for item in group.items)
        segments = epochs.segments(1, done)
    last = Epochs(listed, 7, processes, epoch=1, earlier=segments)
    seen.update(item for group in last.groups(1) for item in group.items)
    assert seen == expected(listed)
    assert Counter(item for group in last.groups(2) for item in group.items) == expected(listed)


def test_the_same_number_of_processes_continues_the_same_order():
    """Stopping and continuing without a change is no cut at all."""
    listed = members()
    whole = Epochs(listed, 7, 2).groups(1)
    segments = Epochs(listed, 7, 2).segments(1, 3)
    assert segments == [[2, 3]]
    again = Epochs(listed, 7, 2, epoch=1, earlier=[])
    assert again.groups(1)[3:] == whole[3:]
