"""Keep an optimizer's state in host memory between its steps.

The state is needed for milliseconds, after the activations are gone; in between it may as well wait in RAM. Works with
any `torch.optim.Optimizer`, 8-bit ones included, through the hooks that every optimizer has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.memory.host import host_tensor


def keep_state_in_ram(optimizer: torch.optim.Optimizer, pin: bool = True) -> None:
    """From now on the state comes to its parameters' devices before each step and leaves after it."""
    optimizer.register_step_pre_hook(lambda *_: _move(optimizer, to_host=False, pin=pin))
    optimizer.register_step_post_hook(lambda *_: _move(optimizer, to_host=True, pin=pin))


def _move(optimizer: torch.optim.Optimizer, to_host: bool, pin: bool) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                state[name] = _in_ram(value, pin) if to_host else value.to(parameter.device, non_blocking=True)


def _in_ram(value: Tensor, pin: bool) -> Tensor:
    if value.device.type == "cpu":
        return value
    return host_tensor(value.shape, value.dtype, pin and value.device.type == "cuda").copy_(value)
