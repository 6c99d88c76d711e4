"""What a micro-step draws and minimises: every key of the objective does what it says."""

import dataclasses

import pytest
import torch

from library.conditioning.item import Condition
from library.config.tables import TrainingTable
from library.flow.timesteps import TimestepChoice
from library.flow.velocity import loss_weighting
from library.training.objective import Objective, Place, loss_area, occurrences, timestep_choice
from tests.training.test_one_step import made_batch

CPU = torch.device("cpu")


def zero(noisy, t, batch, guidance):
    """A model that predicts no velocity: the loss is then the target's own size."""
    return torch.zeros_like(noisy)


def many(count: int = 64):
    """A batch of many items."""
    batch = made_batch()
    index = torch.arange(count) % 2
    return dataclasses.replace(
        batch, mean=batch.mean[index], std=batch.std[index], loss_weight=torch.ones(count),
        changed=batch.changed[index], item_keys=tuple(f"item{i}" for i in range(count)),
        condition=Condition(batch.condition.latents[index], batch.condition.mask[index]),
    )  # fmt: skip


def test_draws_belong_to_items_not_to_places():
    """An item draws the same noise, latents and t wherever it stands, and other ones in the next micro-step."""
    batch = many(4)
    turned = dataclasses.replace(batch, mean=batch.mean.flip(0), std=batch.std.flip(0), item_keys=batch.item_keys[::-1])
    objective = Objective(TrainingTable(), seed=5)
    a, b = objective.draw(batch, Place(3)), objective.draw(turned, Place(3))
    for name in ("latents", "noise", "t", "guidance"):
        assert torch.equal(getattr(a, name), getattr(b, name).flip(0)), name
    later, other = objective.draw(batch, Place(4)), Objective(TrainingTable(), seed=6).draw(batch, Place(3))
    assert not torch.equal(a.noise, later.noise) and not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.t, later.t)


def test_an_item_that_comes_twice_is_drawn_twice():
    """Repeats in one batch are no duplicates."""
    assert occurrences(("a", "b", "a")) == [("a", 0), ("b", 0), ("a", 1)]
    batch = dataclasses.replace(made_batch(), item_keys=("a", "a"))
    noise = Objective(TrainingTable(), 1).draw(batch, Place(0)).noise
    assert not torch.equal(noise[0], noise[1])


def test_target_latents_follow_the_cached_distribution():
    """mean + std * normal, the mean itself where one latent is cached."""
    batch = many(400)
    drawn = Objective(TrainingTable(), 1).draw(batch, Place(0)).latents
    scores = ((drawn - batch.mean) / batch.std.clamp(min=1e-3)).flatten()
    assert abs(scores.mean().item()) < 0.01 and abs(scores.std().item() - 1) < 0.01
    fixed = dataclasses.replace(batch, std=None)
    assert torch.equal(Objective(TrainingTable(), 1).draw(fixed, Place(0)).latents, batch.mean)


def test_stratified_timesteps_cover_the_batch_of_all_processes():
    """One draw in each of as many parts as there are items, whoever computes them."""
    batch = many(8)
    objective = Objective(TrainingTable(stratified_timesteps=True, timestep_sampling="uniform"), 1)
    whole = objective.draw(batch, Place(0, 0, 8)).t
    assert sorted((whole * 8).long().tolist()) == list(range(8))
    parts = []
    for first in (0, 4):
        part = dataclasses.replace(
            batch, mean=batch.mean[first : first + 4], std=batch.std[first : first + 4],
            item_keys=batch.item_keys[first : first + 4],
        )  # fmt: skip
        parts.append(objective.draw(part, Place(0, first, 8)).t)
    assert torch.equal(torch.cat(parts), whole)
    plain = Objective(TrainingTable(timestep_sampling="uniform"), 1).draw(batch, Place(0, 0, 8)).t
    assert sorted((plain * 8).long().tolist()) != list(range(8))


def test_guidance_is_fixed_or_drawn_from_a_range():
    """The value reaches the model."""
    seen = []

    def spying(noisy, t, batch, guidance):
        seen.append(guidance)
        return torch.zeros_like(noisy)

    Objective(TrainingTable(guidance_scale=2.5), 1).losses(spying, many(), Place(0), CPU)
    Objective(TrainingTable(guidance_scale_range=(1.0, 4.0)), 1).losses(spying, many(), Place(0), CPU)
    assert seen[0].unique().tolist() == [2.5]
    assert 1.0 <= seen[1].min() < 1.5 and 3.5 < seen[1].max() <= 4.0


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weighting_schemes_weigh_and_do_not_choose(scheme):
    """The same t as without, and the loss times the weight."""
    batch = many()
    plain, weighted = Objective(TrainingTable(), 1), Objective(TrainingTable(weighting_scheme=scheme), 1)
    t = plain.draw(batch, Place(0)).t
    assert torch.equal(weighted.draw(batch, Place(0)).t, t)
    a, b = (objective.losses(zero, batch, Place(0), CPU) for objective in (plain, weighted))
    torch.testing.assert_close(b, a * loss_weighting(scheme, t))


@pytest.mark.parametrize(("scheme", "low"), [("logit_normal", 0.02), ("mode", 0.05)])
def test_densities_choose_and_do_not_weigh(scheme, low):
    """The loss of an item is the plain one at another t."""
    table = TrainingTable(weighting_scheme=scheme)
    t = Objective(table, 1).draw(many(400), Place(0)).t
    uniform = Objective(TrainingTable(), 1).draw(many(400), Place(0)).t
    assert not torch.equal(t, uniform)
    assert torch.equal(loss_weighting(timestep_choice(table).weighting_scheme, t), torch.ones(400))
    assert (t < low).float().mean() < (uniform < 0.2).float().mean()


def test_every_key_of_the_density_reaches_it():
    """No key is forgotten on the way."""
    table = TrainingTable(
        timestep_sampling="shift", weighting_scheme="uniform", logit_mean=0.1, logit_std=0.2, mode_scale=0.3,
        sigmoid_scale=0.4, discrete_flow_shift=0.5, min_timestep=6, max_timestep=700,
    )  # fmt: skip
    expected = TimestepChoice("shift", "none", 0.1, 0.2, 0.3, 0.4, 0.5, 6, 700)
    assert timestep_choice(table) == expected


@pytest.mark.parametrize("loss_type", ["l1", "huber", "smooth_l1"])
def test_losses_differ_from_the_square(loss_type):
    """And Huber's threshold and schedule act."""
    batch = many()
    square = Objective(TrainingTable(), 1).losses(zero, batch, Place(0), CPU)
    plain = Objective(TrainingTable(loss_type=loss_type), 1).losses(zero, batch, Place(0), CPU)
    assert not torch.allclose(square, plain)
    if loss_type != "l1":
        for options in ({"huber_c": 0.5}, {"huber_scale": 3.0}, {"huber_schedule": "exponential"}):
            other = Objective(TrainingTable(loss_type=loss_type, **options), 1)
            assert not torch.allclose(other.losses(zero, batch, Place(0), CPU), plain), options


def marked():
    """A batch whose left half is to be repainted and whose upper half changed."""
    batch = made_batch()
    mask = torch.zeros(2, 1, 64, 96)
    mask[..., :48] = 1
    changed = torch.zeros(2, 1, 8, 12)
    changed[..., :4, :] = 1
    return dataclasses.replace(batch, condition=Condition(batch.condition.latents, mask), changed=changed)


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("mask", (slice(None), slice(0, 6))),
        ("half", (slice(None), slice(0, 6))),
        ("changed", (slice(0, 4), slice(None))),
    ],
)
def test_masked_loss_counts_only_its_area(kind, area):
    """An error elsewhere counts nothing, or as much as the floor says."""
    batch = marked()
    rows, columns = area

    def wrong_outside(noisy, t, batch, guidance):
        drawn = Objective(TrainingTable(), 1).draw(batch, Place(0))
        predicted = drawn.noise - drawn.latents + 5.0
        predicted[..., rows, columns] -= 5.0
        return predicted

    masked = Objective(TrainingTable(masked_loss=kind), 1).losses(wrong_outside, batch, Place(0), CPU)
    torch.testing.assert_close(masked, torch.zeros(2), atol=1e-9, rtol=0)
    floored = Objective(TrainingTable(masked_loss=kind, masked_loss_floor=0.25), 1)
    expected = 0.25 * 25.0 * 48 / (48 + 0.25 * 48)
    losses = floored.losses(wrong_outside, batch, Place(0), CPU)
    torch.testing.assert_close(losses, torch.full((2,), expected), rtol=1e-5, atol=0)
    assert loss_area("none", 0.0, batch) is None


def test_item_weights_multiply():
    """Regularisation items count as prior_loss_weight says, which the data gives with each item."""
    batch = dataclasses.replace(made_batch(), loss_weight=torch.tensor([1.0, 0.25]))
    plain = Objective(TrainingTable(), 1).losses(zero, made_batch(), Place(0), CPU)
    weighted = Objective(TrainingTable(), 1).losses(zero, batch, Place(0), CPU)
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.25]))
