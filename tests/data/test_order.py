"""The order of batches is a pure function of seed and position, and every item comes as often as it should."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.tables import SubsetTable
from library.data.order import Member, Order, occurrences
from library.data.shares import shares
from library.errors import ConfigError


def members(count: int, repeats: float = 1.0, batch: int = 3, sizes: int = 1) -> list[Member]:
    return [Member(f"item{n}", repeats, (n % 2,), batch, sizes) for n in range(count)]


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_every_item_comes_its_repeats_in_every_epoch(count, batch, repeats, seed) -> None:
    order = Order(members(count, repeats, batch), seed)
    for epoch in range(3):
        start = order.start(epoch)
        plans = [order.batch(start + step) for step in range(order.num_batches(epoch))]
        drawn = Counter(number for plan in plans for number in plan.items)
        assert drawn == {number: repeats for number in range(count)}
        assert all(len(plan.items) <= batch and plan.epoch == epoch for plan in plans)
        assert all(len({order.members[number].group for number in plan.items}) == 1 for plan in plans)


def test_any_position_can_be_asked_first() -> None:
    forward, backward = Order(members(17, 2.5, 4, 3), 7), Order(members(17, 2.5, 4, 3), 7)
    there = [forward.batch(position) for position in range(40)]
    back = [backward.batch(position) for position in reversed(range(40))]
    assert there == back[::-1]
    assert {plan.size for plan in there} == {0, 1, 2}
    assert there != [Order(members(17, 2.5, 4, 3), 8).batch(position) for position in range(40)]


def test_fractions_of_a_repeat_come_out_on_average() -> None:
    order = Order(members(50, 1.3, 1), 0)
    sizes = [order.num_batches(epoch) for epoch in range(40)]
    assert len(set(sizes)) > 1 and sum(sizes) / 40 == pytest.approx(65, abs=2)


def test_epochs_differ() -> None:
    order = Order(members(30, batch=1), 0)
    assert [order.batch(n).items for n in range(30)] != [order.batch(30 + n).items for n in range(30)]


def test_occurrences_count_equal_keys() -> None:
    assert occurrences(("a", "b", "a", "a")) == (0, 0, 1, 2)


def test_weights_give_shares() -> None:
    subsets = [SubsetTable(subset_weight=3.0), SubsetTable(subset_weight=1.0)]
    found = shares(("a", "b"), subsets, (10, 1000))
    assert [share.share for share in found] == pytest.approx([0.75, 0.25])
    assert min(share.repeats for share in found) == 1
    with pytest.raises(ConfigError, match="for b"):
        shares(("a", "b"), [subsets[0], SubsetTable()], (10, 10))


def test_regularisation_comes_as_often_as_everything_else() -> None:
    found = shares(("a", "r"), [SubsetTable(num_repeats=2), SubsetTable(is_reg=True)], (10, 4))
    assert [share.share for share in found] == pytest.approx([0.5, 0.5]) and found[1].repeats == 5
