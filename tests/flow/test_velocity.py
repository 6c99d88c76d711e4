"""Mixing, target, weights and losses against diffusers' functions and closed forms."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from library.flow.timesteps import sigma_table
from library.flow.velocity import distance, huber_threshold, item_losses, loss_weighting, mix, velocity_target


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random latents of a non-square picture."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 16, 4, 6, generator=generator), torch.randn(3, 16, 4, 6, generator=generator)


def test_mix_equals_the_scheduler_of_flux():
    """x_t is what FlowMatchEulerDiscreteScheduler.scale_noise makes at the same sigmas."""
    latents, noise = pair()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    index = torch.tensor([0, 499, 999])
    theirs = scheduler.scale_noise(latents, scheduler.timesteps[index], noise)
    torch.testing.assert_close(mix(latents, noise, sigma_table()[index]), theirs, rtol=1e-6, atol=1e-6)


def test_target_is_the_derivative_of_the_path():
    """d x_t / d t, whatever t."""
    latents, noise = (x.double() for x in pair())
    step = 1e-6
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (mix(latents, noise, t + step) - mix(latents, noise, t)) / step
    torch.testing.assert_close(slope, velocity_target(latents, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_weighting_equals_diffusers(scheme):
    """Only sigma_sqrt and cosmap weigh the loss."""
    t = torch.tensor([0.001, 0.25, 0.5, 1.0])
    torch.testing.assert_close(loss_weighting(scheme, t), compute_loss_weighting_for_sd3(scheme, t))


def test_l2_and_l1():
    """Squares and absolute values, in float32 even for bf16 predictions."""
    predicted, target = pair()
    torch.testing.assert_close(distance(predicted, target, "l2"), (predicted - target) ** 2)
    torch.testing.assert_close(distance(predicted, target, "l1"), (predicted - target).abs())
    assert distance(predicted.bfloat16(), target, "l2").dtype == torch.float32


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_losses_are_square_near_zero_and_straight_far_out(loss_type):
    """pseudo-Huber: e^2 (huber) or e^2 / c (smooth_l1) near zero, slope 2c or 2 far out."""
    c = torch.tensor([0.1, 0.1])
    error = torch.tensor([[[[1e-3]]], [[[100.0]]]], dtype=torch.float64)
    small, large = distance(error, torch.zeros_like(error), loss_type, c).flatten().double()
    scale = 1.0 if loss_type == "huber" else 0.1
    assert small.item() == pytest.approx(1e-6 / scale, rel=0.01)
    assert large.item() == pytest.approx(2 * 100.0 * 0.1 / scale, rel=0.01)


def test_huber_threshold_falls_with_noise_on_the_exponential_schedule():
    """huber_scale at t = 0, huber_c * huber_scale at t = 1, geometric between."""
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(
        huber_threshold("exponential", 0.1, 2.0, t), 2.0 * torch.tensor([1.0, math.sqrt(0.1), 0.1])
    )
    torch.testing.assert_close(huber_threshold("constant", 0.1, 2.0, t), torch.full((3,), 0.2))


def test_item_losses_average_each_item_on_its_own():
    """Items are kept apart, so that each can carry its own weight."""
    elements, _ = pair()
    torch.testing.assert_close(item_losses(elements), elements.mean((1, 2, 3)))


def test_masked_losses_count_only_the_weighted_area():
    """Outside the area nothing counts; a floor lets it count a little; an empty area is zero, not NaN."""
    elements = torch.ones(3, 16, 4, 6)
    elements[..., 3:] = 5.0
    area = torch.zeros(3, 1, 4, 6)
    area[:2, ..., :3] = 1.0
    area[1, ..., 3:] = 0.5
    losses = item_losses(elements, area)
    torch.testing.assert_close(losses, torch.tensor([1.0, (1.0 + 0.5 * 5.0) / 1.5, 0.0]))
