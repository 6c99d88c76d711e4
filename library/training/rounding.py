"""Training with bfloat16 weights and no float32 copy of them, without losing small updates.

A bfloat16 weight keeps 8 bits: at the usual rates most updates are smaller than half its last bit and would round
away. Rounding up or down at random, with the odds of the remainder, keeps the updates on average.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_LOW_BITS = 16  # float32 has 16 mantissa bits more than bfloat16


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up with the probability of the remainder; inf and NaN are kept as they are."""
    noise = torch.randint(0, 1 << _LOW_BITS, values.shape, generator=generator, dtype=torch.int32, device="cpu")
    bits = values.contiguous().view(torch.int32) + noise.to(values.device)
    rounded = (bits & -(1 << _LOW_BITS)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()


@contextlib.contextmanager
def float32_look(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block bfloat16 parameters are float32; after it they are the nearest bfloat16. No gradients are held.

    For schedule-free optimizers, which mix a weight with their float32 average when they change between the weights
    to train and the weights to look at.
    """
    halves = [p for p in parameters if p.dtype == torch.bfloat16]
    for parameter in halves:
        parameter.grad = None
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in halves:
            parameter.data = parameter.data.bfloat16()


@contextlib.contextmanager
def float32_step(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> Iterator[None]:
    """Inside the block bfloat16 parameters and their gradients are float32; after it they are rounded at random.

    The float32 copies live only while the optimizer steps, when a step's activations are gone.
    """
    halves = [p for p in parameters if p.dtype == torch.bfloat16]
    for parameter in halves:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for parameter in halves:
            parameter.grad = None
            parameter.data = stochastic_round(parameter.data, generator)
