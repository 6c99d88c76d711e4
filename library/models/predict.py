"""The one function that says what the model predicts: training, previews and inference all call it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from library.conditioning.item import Condition
from library.flow.packing import image_ids, pack_latents, unpack_latents
from library.models.flux import FluxTransformer, Modulation
from library.models.text import TextEmbeddings


def predict(
    transformer: FluxTransformer,
    noisy: Tensor,
    t: Tensor,
    text: TextEmbeddings,
    condition: Condition,
    guidance: float | Tensor,
    modulation: Modulation | None = None,
) -> Tensor:
    """The velocity (noise - latents) at `noisy`.

    noisy: (B, 16, h, w) latents in model space; t: (B,) in (0, 1]; guidance: one value or (B,).
    modulation: the result of `prepare` for this batch, where it was computed ahead.
    Returns (B, 16, h, w) in the dtype of `noisy`.
    """
    height, width = noisy.shape[-2:]
    device, dtype = transformer.device, transformer.dtype
    channels = condition.to(device, dtype).channels()
    tokens = torch.cat([pack_latents(noisy.to(device, dtype)), channels], dim=-1)
    if modulation is None:
        modulation = prepare(transformer, t, text, guidance)
    output = transformer(
        tokens, text.t5.to(device), text.pooled, t, None, grid_ids(height, width), modulation=modulation
    )
    return unpack_latents(output, height, width).to(noisy.dtype)


def prepare(transformer: FluxTransformer, t: Tensor, text: TextEmbeddings, guidance: float | Tensor) -> Modulation:
    """The part of a prediction that needs t, pooled text and guidance alone, so that it can be done a batch ahead."""
    home = transformer.time_in.in_layer.device
    scale = None
    if transformer.shape.guidance:
        values = guidance.tolist() if isinstance(guidance, Tensor) else [float(guidance)]
        scale = scales(tuple(values * t.shape[0] if len(values) == 1 else values))
    return transformer.modulate(t.to(home), scale, text.pooled.to(home))


@lru_cache(maxsize=64)
def scales(guidance: tuple[float, ...]) -> Tensor:
    """Guidance scales (B,) float32: one tensor for the same values, so that their embedding is found again."""
    return torch.tensor(guidance)


@lru_cache(maxsize=64)
def grid_ids(height: int, width: int) -> Tensor:
    """The position ids of latents of this size: one tensor per size, so that rotation tables are found again."""
    return image_ids(height, width)
