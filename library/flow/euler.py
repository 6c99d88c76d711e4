"""From noise to picture along the straight path: the noise levels FluxFillPipeline visits, and one Euler step.

The levels run evenly from 1 down to 1/n and are then shifted towards noise, more for larger pictures (the base's
`scheduler_config.json` says how much): a large picture keeps its layout visible under more noise than a small one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from library.errors import ModelError

# Options of FlowMatchEulerDiscreteScheduler that no FLUX base sets: sampling on without them would be silently wrong.
_UNSUPPORTED = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling",
)  # fmt: skip


@dataclass(frozen=True)
class SigmaSchedule:
    """The fields of a base's scheduler configuration that decide the noise levels; diffusers' names and defaults."""

    use_dynamic_shifting: bool = False
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SigmaSchedule":
        """Read a `scheduler_config.json`. Raises ModelError for a schedule that is not FLUX's."""
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ModelError(f"the base's scheduler is {name}; InFlux knows only FlowMatchEulerDiscreteScheduler")
        for option in _UNSUPPORTED:
            if config.get(option):
                raise ModelError(
                    f"the base's scheduler sets {option} = {config[option]!r}, which FLUX bases do not use"
                )
        known = {field.name for field in fields(cls)}
        schedule = cls(**{key: value for key, value in config.items() if key in known and value is not None})
        if schedule.time_shift_type not in ("exponential", "linear"):
            raise ModelError(f"the base's scheduler has time_shift_type = {schedule.time_shift_type!r}")
        return schedule

    def mu(self, num_tokens: int) -> float:
        """The dynamic shift of a picture of `num_tokens` tokens: a straight line through the two configured points."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return num_tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """(num_steps + 1,) noise levels from 1 to 0, float32, for a picture of `num_tokens` tokens."""
        # float64 first, then float32, as numpy's linspace does it in the pipeline: the levels agree to the last bit
        sigmas = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64).float()
        if self.use_dynamic_shifting:
            mu = self.mu(num_tokens)
            # a tensor: torch turns number / tensor into a multiplication by the inverse, which misses 1 at the start
            shift = torch.tensor(math.exp(mu) if self.time_shift_type == "exponential" else mu)
            sigmas = shift / (shift + (1 / sigmas - 1))
        else:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        if self.shift_terminal:
            remaining = 1 - sigmas
            sigmas = 1 - remaining / (remaining[-1] / (1 - self.shift_terminal))
        return torch.cat([sigmas, torch.zeros(1)])


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Move latents from noise level `sigma` to `next_sigma` along the velocity (noise - picture)."""
    return latents + (next_sigma - sigma) * velocity
