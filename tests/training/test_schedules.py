"""The curves against diffusers' own schedules, and the ones diffusers does not have against their formulas."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from library.errors import ConfigError
from library.training.schedules import SCHEDULES, build

RATE = 1e-4


def theirs(name: str, num_steps: int, warmup: int, cycles: int, power: float) -> list[float]:
    """The rates that diffusers' schedule gives to each optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps, num_cycles=cycles, power=power
    )
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_the_usual_six_equal_diffusers(name, warmup, cycles, power):
    """Step by step, with and without warm-up."""
    if name == "cosine":  # diffusers takes half cycles from its own default when it is not told
        cycles = 1
    schedule = build(name, 40, warmup, num_cycles=cycles, power=power, end_ratio=1e-7 / RATE)
    ours = [RATE * schedule.factor(step) for step in range(40)]
    assert ours == pytest.approx(theirs(name, 40, warmup, cycles, power), rel=1e-9, abs=1e-16)


def test_cosine_with_min_lr_ends_at_its_floor():
    """From 1 to the floor, never below."""
    schedule = build("cosine_with_min_lr", 100, 10, min_ratio=0.2)
    factors = [schedule.factor(step) for step in range(10, 101)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    assert min(factors) >= 0.2
    assert factors == sorted(factors, reverse=True)


def test_warmup_stable_decay_has_three_parts():
    """Up, level, down; fractions count as shares of the run."""
    schedule = build("warmup_stable_decay", 100, 0.1, decay=0.2, min_ratio=0.1)
    assert schedule.factor(5) == 0.5
    assert [schedule.factor(step) for step in (10, 50, 79)] == [1.0, 1.0, 1.0]
    assert schedule.factor(90) == pytest.approx(0.55)
    assert schedule.factor(100) == pytest.approx(0.1)


def test_rex_stays_above_linear():
    """Reflected exponential: 2/3 of the rate is left at half time (1/2 / 3/4)."""
    schedule = build("rex", 100)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(50) == pytest.approx(0.5 / 0.75)
    assert schedule.factor(100) == 0.0


def test_inverse_sqrt_halves_in_three_timescales():
    """(1 + t / scale)^-1/2."""
    schedule = build("inverse_sqrt", 1000, 10, timescale=50)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(160) == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_curve_is_finite_and_within_bounds(name):
    """Also past the end, where an extended run may look."""
    schedule = build(name, 20, 4)
    assert all(0.0 <= schedule.factor(step) <= 1.0 for step in range(30))


def test_impossible_lengths_are_refused():
    """More warm-up than steps says so."""
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        build("cosine", 100, 500)
    assert build("constant", 100, 500).factor(0) == 1.0
    with pytest.raises(ConfigError, match="'cosinee'"):
        build("cosinee", 100)
