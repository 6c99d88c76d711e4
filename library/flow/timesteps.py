"""Where on the path from picture to noise a training step looks.

Every density here is a function of one uniform number per item, so that a draw can be keyed to its item and spread
evenly over a batch, whatever the density. t is the share of noise: 0 is the picture, 1 is pure noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
SMALLEST_T = 1e-5  # `1 / t**2` and `log t` stay finite; no table of 1000 sigmas goes below 1e-3
BASE_TOKENS, MAX_TOKENS = 256, 4096  # FLUX's resolution shift is a line through these two points
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15

DENSITIES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")


@dataclass(frozen=True)
class TimestepChoice:
    """All that decides t. `discrete_flow_shift` None: unshifted for `sigma`, 3.0 for `shift`."""

    timestep_sampling: str = "sigma"
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float | None = None
    min_timestep: float = 0.0
    max_timestep: float = float(NUM_TRAIN_TIMESTEPS)


def density(uniform: Tensor, scheme: str, logit_mean: float, logit_std: float, mode_scale: float) -> Tensor:
    """Uniform numbers -> u of Stable Diffusion 3's paper (section 3.1): `logit_normal` and `mode`, else unchanged.

    `sigma_sqrt` and `cosmap` are weights on the loss and draw u evenly (see velocity.loss_weighting).
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * standard_normal(uniform))
    if scheme == "mode":
        return 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def standard_normal(uniform: Tensor) -> Tensor:
    """Uniform -> standard normal, by the inverse of the normal distribution; the ends are kept finite."""
    tail = torch.finfo(torch.float32).eps / 2
    return torch.special.ndtri(uniform.clamp(tail, 1 - tail))


def sigma_table(shift: float = 1.0) -> Tensor:
    """The 1000 sigmas of FlowMatchEulerDiscreteScheduler, from 1.0 down to 0.001 (when unshifted), float32.

    FLUX's scheduler shifts dynamically at inference and therefore leaves this table unshifted.
    """
    steps = torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=torch.float32)
    return shift_by_factor(steps / NUM_TRAIN_TIMESTEPS, shift)


def shift_by_factor(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): moves t towards noise for s > 1."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_mu(num_tokens: int) -> float:
    """FLUX's shift exponent for a picture of `num_tokens` tokens: 0.5 at 256 tokens, 1.15 at 4096."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + slope * (num_tokens - BASE_TOKENS)


def shift_by_mu(t: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/t - 1), the time shift FLUX samples with."""
    return math.exp(mu) / (math.exp(mu) + (1 / t.clamp(min=SMALLEST_T) - 1))


def timesteps(uniform: Tensor, choice: TimestepChoice, num_tokens: int) -> Tensor:
    """Uniform numbers (B,) in [0, 1) -> t (B,) float32 in (0, 1]."""
    t = _sampled(uniform, choice, num_tokens)
    low, high = choice.min_timestep / NUM_TRAIN_TIMESTEPS, choice.max_timestep / NUM_TRAIN_TIMESTEPS
    if (low, high) != (0.0, 1.0):
        t = low + (high - low) * t
    return t.float().clamp(SMALLEST_T, 1.0)


def _sampled(uniform: Tensor, choice: TimestepChoice, num_tokens: int) -> Tensor:
    if choice.timestep_sampling == "sigma":
        u = density(uniform, choice.weighting_scheme, choice.logit_mean, choice.logit_std, choice.mode_scale)
        index = (u * NUM_TRAIN_TIMESTEPS).long().clamp(0, NUM_TRAIN_TIMESTEPS - 1)
        return sigma_table(1.0 if choice.discrete_flow_shift is None else choice.discrete_flow_shift)[index]
    if choice.timestep_sampling == "uniform":
        return uniform
    t = torch.sigmoid(choice.sigmoid_scale * standard_normal(uniform))
    if choice.timestep_sampling == "sigmoid":
        return t
    if choice.timestep_sampling == "shift":
        return shift_by_factor(t, 3.0 if choice.discrete_flow_shift is None else choice.discrete_flow_shift)
    if choice.timestep_sampling == "flux_shift":
        return shift_by_mu(t, resolution_mu(num_tokens))
    raise ValueError(f"unknown timestep_sampling {choice.timestep_sampling!r}; known: {', '.join(SAMPLINGS)}")


def stratified(uniform: Tensor, strata: Tensor, num_strata: int) -> Tensor:
    """Moves uniform number i into stratum `strata[i]` of `num_strata` equal parts, so that a batch covers [0, 1)."""
    # (stratum + u) / n rounds up to 1.0 for the last stratum and u near 1; 1.0 is outside the interval
    return ((strata + uniform) / num_strata).clamp(max=1 - torch.finfo(torch.float32).eps / 2)
