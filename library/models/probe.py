"""One step on the largest batch before the first: a card that is too small says so at once, and not after an hour.

The probe computes on zeros and draws nothing from anyone: neither the order of the data nor a single random number of
the run changes, and its gradients are thrown away.
"""

from __future__ import annotations

import torch

from library.conditioning.item import Condition
from library.flow.packing import LATENT_SCALE
from library.models.flux import FluxTransformer
from library.models.predict import predict
from library.models.text import TextEmbeddings

LATENT_CHANNELS = 16


def probe_step(transformer: FluxTransformer, width: int, height: int, batch: int, text_length: int) -> float:
    """A forward and backward pass of this size (pixels); returns the peak of reserved device memory in GB (0 on a CPU).

    Raises whatever running out of memory raises.
    """
    device, shape = transformer.device, transformer.shape
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    size = (batch, LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE)
    zeros = torch.zeros(size, device=device)
    text = TextEmbeddings(
        torch.zeros(batch, text_length, shape.text_width, device=device, dtype=transformer.dtype),
        torch.zeros(batch, shape.pooled_width, device=device, dtype=transformer.dtype),
    )
    condition = Condition(zeros, torch.zeros(batch, 1, height, width, device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        output = predict(transformer, zeros, torch.full((batch,), 0.5, device=device), text, condition, 1.0)
        output.float().square().mean().backward()
    for parameter, gradient in zip(parameters, before):
        parameter.grad = gradient
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_reserved(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak
