"""The largest moments of a run, tried out before its first step: a card that is too small says so at once.

A probe computes on zeros and draws nothing from anyone: neither the order of the data nor a single random number of the
run changes, and its gradients are thrown away. What the run will hold later and does not hold yet (the optimizer's
state, gradients of earlier micro-steps) is held as empty memory meanwhile.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from library.conditioning.item import Condition
from library.flow.packing import LATENT_SCALE
from library.models.flux import FluxTransformer
from library.models.predict import predict
from library.models.text import TextEmbeddings

LATENT_CHANNELS = 16


def hold(parameters: Sequence[nn.Parameter], bytes_each: float) -> list[Tensor]:
    """Empty memory beside each parameter, on its device: so many bytes for each element. Freed with the list."""
    return [
        torch.empty(math.ceil(parameter.numel() * bytes_each), dtype=torch.uint8, device=parameter.device)
        for parameter in parameters
        if bytes_each > 0
    ]


def probe_step(
    transformer: FluxTransformer,
    width: int,
    height: int,
    batch: int,
    text_length: int,
    parameters: Sequence[nn.Parameter] | None = None,
    pooled: Callable[[int], Tensor] | None = None,
    accumulates: bool = False,
    stepping: float = 0.0,
) -> None:
    """A forward and backward pass of this size (pixels), and the memory of the optimizer's step.

    parameters: what is trained, if not the transformer's parameters alone. pooled: CLIP's pooled vectors of so many
    captions, where CLIP is trained as well. accumulates: gradients of earlier micro-steps are there already. stepping:
    bytes per trained parameter that exist only while the optimizer steps.

    Raises whatever running out of memory raises.
    """
    if parameters is None:
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    condition, text = zeros(transformer, width, height, batch, text_length)
    with _borrowed_gradients(parameters, accumulates), _untouched_draws(transformer.device):
        if pooled is not None:
            text = TextEmbeddings(text.t5, pooled(batch))
        noisy = condition.latents
        output = predict(transformer, noisy, torch.full((batch,), 0.5, device=noisy.device), text, condition, 1.0)
        output.float().square().mean().backward()
        del output, noisy
        hold(parameters, stepping)


def zeros(
    transformer: FluxTransformer, width: int, height: int, batch: int, text_length: int
) -> tuple[Condition, TextEmbeddings]:
    """A batch of this size (pixels) that is nothing but zeros."""
    device, shape = transformer.device, transformer.shape
    size = (batch, LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE)
    text = TextEmbeddings(
        torch.zeros(batch, text_length, shape.text_width, device=device, dtype=transformer.dtype),
        torch.zeros(batch, shape.pooled_width, device=device, dtype=transformer.dtype),
    )
    return Condition(torch.zeros(size, device=device), torch.zeros(batch, 1, height, width, device=device)), text


@contextlib.contextmanager
def _borrowed_gradients(parameters: Sequence[nn.Parameter], accumulates: bool) -> Iterator[None]:
    """Gradients inside the block are nobody's: those of before are there again after it."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulates else None
        yield
    finally:
        for parameter, gradient in zip(parameters, before):
            parameter.grad = gradient


@contextlib.contextmanager
def _untouched_draws(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
