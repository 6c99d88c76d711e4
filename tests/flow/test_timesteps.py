"""t against diffusers' own functions and the densities' formulas."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from library.flow.timesteps import (
    SAMPLINGS,
    TimestepChoice,
    density,
    resolution_mu,
    shift_by_mu,
    sigma_table,
    standard_normal,
    stratified,
    timesteps,
)


def even(count: int = 4096) -> torch.Tensor:
    """Midpoints of `count` equal parts of [0, 1): what a perfectly uniform draw looks like."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "mode"])
def test_density_equals_diffusers_given_the_same_uniform_numbers(scheme):
    """`mode` and the even schemes are the same function of the same uniform numbers, value for value."""
    theirs = compute_density_for_timestep_sampling(
        scheme, 64, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=torch.Generator().manual_seed(3)
    )
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(density(uniform, scheme, 0.0, 1.0, 1.29), theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 1.6)])
def test_logit_normal_equals_diffusers_given_the_same_normal_numbers(mean, std):
    """diffusers draws the normal number directly; ours comes from a uniform one through the inverse of its CDF."""
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 64, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(5)
    ).double()
    normals = torch.normal(mean, std, (64,), generator=torch.Generator().manual_seed(5)).double()
    uniform = torch.special.ndtr((normals - mean) / std)
    torch.testing.assert_close(density(uniform, "logit_normal", mean, std, 1.29), theirs, rtol=1e-6, atol=1e-7)


def test_sigma_table_equals_the_scheduler_of_flux():
    """FLUX's scheduler shifts dynamically, so its training table is unshifted; a static shift is kohya's."""
    flux = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(sigma_table(), flux.sigmas, rtol=0, atol=0)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(sigma_table(3.0), static.sigmas, rtol=1e-6, atol=0)


def test_sigma_sampling_reads_the_table_at_the_index_of_u():
    """u = 0 is pure noise (index 0), u just below 1 is the least noise, 0.001."""
    t = timesteps(torch.tensor([0.0, 0.25, 0.9999]), TimestepChoice(), 256)
    torch.testing.assert_close(t, torch.tensor([1.0, 0.75, 0.001]))


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096, 2304])
def test_resolution_shift_equals_the_pipeline(num_tokens):
    """mu and the shift are those of FluxFillPipeline and its scheduler."""
    mu = calculate_shift(num_tokens)
    assert resolution_mu(num_tokens) == pytest.approx(mu, rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    theirs = torch.as_tensor(scheduler.time_shift(mu, 1.0, t))
    torch.testing.assert_close(shift_by_mu(t, mu), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sampling", ["sigmoid", "shift", "flux_shift"])
def test_logit_samplings_have_the_median_of_their_formula(sampling):
    """The median of a monotone function of a normal number is the function at zero."""
    choice = TimestepChoice(timestep_sampling=sampling, sigmoid_scale=1.7, discrete_flow_shift=None)
    expected = {
        "sigmoid": 0.5,
        "shift": 3.0 * 0.5 / (1 + 2.0 * 0.5),
        "flux_shift": math.exp(1.15) / (math.exp(1.15) + 1),
    }[sampling]
    assert timesteps(even(4097), choice, 4096).median().item() == pytest.approx(expected, abs=1e-3)


def test_sigmoid_scale_widens():
    """A larger scale moves mass to both ends."""
    narrow = timesteps(even(), TimestepChoice(timestep_sampling="sigmoid", sigmoid_scale=0.5), 256)
    wide = timesteps(even(), TimestepChoice(timestep_sampling="sigmoid", sigmoid_scale=2.0), 256)
    assert wide.std() > 2 * narrow.std()


def test_flux_shift_depends_on_the_number_of_tokens():
    """A larger picture is trained at noisier times."""
    choice = TimestepChoice(timestep_sampling="flux_shift")
    assert timesteps(even(), choice, 4096).mean() > timesteps(even(), choice, 256).mean() + 0.1


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_t_stays_inside_the_asked_for_range(sampling, scheme):
    """min_timestep and max_timestep bound t, and no extreme draw leaves (0, 1]."""
    uniform = torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-9, 1 - 2**-53], dtype=torch.float64)
    whole = timesteps(uniform, TimestepChoice(timestep_sampling=sampling, weighting_scheme=scheme), 1024)
    assert whole.min() > 0
    assert whole.max() <= 1
    part = timesteps(uniform, TimestepChoice(sampling, scheme, min_timestep=200, max_timestep=600), 1024)
    assert part.min() >= 0.2 - 1e-6
    assert part.max() <= 0.6 + 1e-6
    assert part.max() > 0.5


def test_stratified_puts_one_draw_into_each_part():
    """A batch of n covers [0, 1) in n parts, in the given order."""
    uniform = torch.tensor([0.0, 0.999999999, 0.5, 0.25], dtype=torch.float64)
    strata = torch.tensor([3, 3, 0, 2])
    spread = stratified(uniform, strata, 4)
    assert torch.equal((spread * 4).long(), strata)
    assert stratified(torch.tensor([1 - 2**-24]), torch.tensor([3]), 4).item() < 1.0


def test_standard_normal_is_finite_at_the_ends():
    """An exact 0 or 1 would be an infinite normal number."""
    assert torch.isfinite(standard_normal(torch.tensor([0.0, 1.0], dtype=torch.float64))).all()


def test_unknown_sampling_is_named():
    """A misspelt name says what is known."""
    with pytest.raises(ValueError, match="flux_shfit.*flux_shift"):
        timesteps(torch.tensor([0.5]), TimestepChoice(timestep_sampling="flux_shfit"), 256)
