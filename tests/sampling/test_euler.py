"""Our noise levels and Euler step against diffusers' own scheduler, as FluxFillPipeline drives it."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import ModelError
from library.flow.euler import SigmaSchedule, euler_step

FLUX = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip
CONFIGS = {
    "flux": FLUX,
    "linear": {**FLUX, "time_shift_type": "linear"},
    "other points": {**FLUX, "base_shift": 0.3, "max_shift": 1.9, "base_image_seq_len": 16, "max_image_seq_len": 1024},
    "static": {"shift": 3.0},
    "none": {"shift": 1.0},
    "terminal": {**FLUX, "shift_terminal": 0.1},
}


def reference(config: dict, num_steps: int, num_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler as the pipeline sets it up."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(
        num_tokens, scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len,
        scheduler.config.base_shift, scheduler.config.max_shift,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("num_tokens", [16, 1024, 4096, 6000])
def test_sigmas_are_the_schedulers(name: str, num_steps: int, num_tokens: int) -> None:
    if name == "terminal" and num_steps == 1:
        pytest.skip("one step cannot be stretched: its only level is 1")
    scheduler = reference(CONFIGS[name], num_steps, num_tokens)
    sigmas = SigmaSchedule.from_config(scheduler.config).sigmas(num_steps, num_tokens)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (num_steps + 1,)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=2e-7, atol=1e-7)


def test_every_config_gives_other_levels() -> None:
    """Else the table above would test one thing six times."""
    drawn = {
        name: tuple(SigmaSchedule.from_config(config).sigmas(8, 1024).tolist()) for name, config in CONFIGS.items()
    }
    assert len(set(drawn.values())) == len(CONFIGS)


@settings(max_examples=30, deadline=None)
@given(num_steps=st.integers(1, 100), num_tokens=st.integers(1, 20000))
def test_levels_fall_from_one_to_zero(num_steps: int, num_tokens: int) -> None:
    sigmas = SigmaSchedule.from_config(FLUX).sigmas(num_steps, num_tokens)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_steps_are_the_schedulers() -> None:
    scheduler = reference(FLUX, 6, 1024)
    sigmas = SigmaSchedule.from_config(FLUX).sigmas(6, 1024)
    ours = theirs = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * ours + index)
        ours = euler_step(ours, velocity, sigmas[index].item(), sigmas[index + 1].item())
        theirs = scheduler.step(torch.sin(3 * theirs + index), timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DPMSolverMultistepScheduler"},
        {**FLUX, "use_karras_sigmas": True},
        {**FLUX, "stochastic_sampling": True},
        {**FLUX, "time_shift_type": "sideways"},
    ],
)
def test_a_schedule_we_cannot_follow_is_refused(config: dict) -> None:
    with pytest.raises(ModelError, match="the base's scheduler"):
        SigmaSchedule.from_config(config)
