"""Condition -> latents -> picture: the denoising run that previews and inference share.

It calls the same `predict` as training and visits the noise levels of FluxFillPipeline. The noise of a picture depends
on its seed and size alone, never on what else is in the batch or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from library.conditioning.item import Condition
from library.errors import NonFiniteError
from library.flow.draws import normal
from library.flow.euler import SigmaSchedule, euler_step
from library.flow.packing import PATCH
from library.models.flux import FluxTransformer
from library.models.predict import predict
from library.models.text import TextEmbeddings

Progress = Callable[[int], None]


def initial_noise(seeds: Sequence[int], condition: Condition) -> Tensor:
    """(B, 16, h, w) float32 on the CPU: one seed per picture of `condition`."""
    shape = tuple(condition.latents.shape[1:])
    return torch.stack([normal(shape, seed, "sample") for seed in seeds])


@torch.no_grad()
def sample(
    transformer: FluxTransformer,
    condition: Condition,
    text: TextEmbeddings,
    noise: Tensor,
    *,
    schedule: SigmaSchedule,
    steps: int,
    guidance: float,
    negative: tuple[TextEmbeddings, float] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Denoise `noise` (B, 16, h, w) in `steps` Euler steps; returns latents in model space, float32.

    negative: a negative prompt and the scale of classifier-free guidance away from it, which doubles the work.
    progress: called with the number of each finished step. Raises NonFiniteError if the result is not a picture.
    """
    device = transformer.device
    height, width = noise.shape[-2:]
    sigmas = schedule.sigmas(steps, (height // PATCH) * (width // PATCH)).tolist()
    latents = noise.to(device, torch.promote_types(noise.dtype, torch.float32))
    condition = condition.to(device)
    text = text.to(device)
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        t = latents.new_full((len(latents),), sigma)
        velocity = predict(transformer, latents, t, text, condition, guidance)
        if negative is not None:
            away = predict(transformer, latents, t, negative[0].to(device), condition, guidance)
            velocity = away + negative[1] * (velocity - away)
        latents = euler_step(latents, velocity, sigma, next_sigma)
        if progress is not None:
            progress(step)
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            "the picture turned to NaN while it was denoised: arithmetic in fp16 is too narrow for FLUX.1 Fill (set "
            'mixed_precision = "bf16" or "no"), or the network is broken (tools/check_lora.py looks into its file)'
        )
    return latents
