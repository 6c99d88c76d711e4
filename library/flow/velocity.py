"""What the model learns: the velocity from picture to noise, and how far off a prediction is.

The path is the straight line of rectified flow, x_t = (1 - t) x_0 + t noise, whose velocity is noise - x_0.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from library.flow.timesteps import NUM_TRAIN_TIMESTEPS

LOSSES = ("l2", "l1", "huber", "smooth_l1")


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def mix(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 - t) latents + t noise, t (B,)."""
    t = per_item(t, latents)
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the straight path, the same at every t."""
    return noise - latents


def loss_weighting(scheme: str, t: Tensor) -> Tensor:
    """(B,) weight on the loss: `sigma_sqrt` is 1/t^2, `cosmap` is 2 / (pi (1 - 2t + 2t^2)); every other scheme 1."""
    if scheme == "sigma_sqrt":
        return t.float() ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)


def huber_threshold(schedule: str, huber_c: float, huber_scale: float, t: Tensor) -> Tensor:
    """(B,) the error at which a Huber loss turns from square to straight.

    `exponential` falls from huber_scale at t = 0 to huber_c * huber_scale at t = 1; `constant` is the latter.
    """
    if schedule == "exponential":
        rate = -math.log(huber_c) / NUM_TRAIN_TIMESTEPS
        return torch.exp(-rate * t * NUM_TRAIN_TIMESTEPS) * huber_scale
    return torch.full_like(t, huber_c * huber_scale)


def distance(predicted: Tensor, target: Tensor, loss_type: str, threshold: Tensor | None = None) -> Tensor:
    """Element-wise loss, in float32. `threshold` (B,) is needed by `huber` and `smooth_l1` (pseudo-Huber forms)."""
    predicted, target = predicted.float(), target.float()
    if loss_type == "l2":
        return functional.mse_loss(predicted, target, reduction="none")
    if loss_type == "l1":
        return functional.l1_loss(predicted, target, reduction="none")
    assert threshold is not None, loss_type
    delta = per_item(threshold.float(), predicted)
    bent = torch.sqrt((predicted - target) ** 2 + delta**2) - delta
    return 2 * delta * bent if loss_type == "huber" else 2 * bent


def item_losses(elements: Tensor, weight_map: Tensor | None = None) -> Tensor:
    """(B, C, h, w) -> (B,): each item's mean, over the area `weight_map` (B, 1, h, w) gives weight to.

    A weighted mean, so that a small repainted area counts as much as a large one: an item's loss is the error per
    unit of what it was asked to repaint.
    """
    if weight_map is None:
        return elements.flatten(1).mean(1)
    weights = weight_map.expand_as(elements).flatten(1)
    total = weights.sum(1)
    # an item without any weighted area (an all-black mask, no floor) teaches nothing rather than dividing by zero
    return (elements.flatten(1) * weights).sum(1) / torch.where(total > 0, total, torch.ones_like(total))
