"""The blocks' element-wise parts as plain functions, each compiled into few kernels forward and few backward.

These regions, and not whole blocks, are compiled: whatever stands between them (weights in any precision, streamed or
not, adapters, checkpointing, attention) stays as it is. Queries and keys are separate calls, because inductor takes
one of two backward passes in one graph apart again (105 MB instead of 58 for a single block at 512 px).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.memory.checkpoint import gated_sum
from library.models.elementwise import EPSILON, Elementwise, rms_norm

VARIANTS = 64
"""Graphs that one region may have. Token counts, and batches above one, share a graph; what remains is one sample or
several, with gradients or without, and of which inputs. Beyond this the compiler raises, it never goes eager."""


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulated_norm` for a compiler."""
    return F.layer_norm(x, (x.shape[-1],), eps=EPSILON) * scale + shift


def plain_gated_norm(x: Tensor, gate: Tensor, value: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`gated_norm` for a compiler: two outputs of one kernel."""
    x = plain_gated_sum(x, gate, value)
    return x, plain_modulated_norm(x, shift, scale)


def plain_gated_sum(residual: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """`gated_sum` for a compiler."""
    output = residual + gate * value
    return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def plain_rotated_norm(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """`rotated_norm` for a compiler; the table is real: (1, N, D/2, 2)."""
    return _from_inputs(lambda x, scale, table: _turned(rms_norm(x, scale), table), x, scale, table)


def plain_joint_norm(txt: Tensor, img: Tensor, txt_scale: Tensor, img_scale: Tensor, table: Tensor) -> Tensor:
    """`joint_norm` for a compiler; the table is real: (1, N, D/2, 2)."""

    def joint(txt: Tensor, img: Tensor, txt_scale: Tensor, img_scale: Tensor, table: Tensor) -> Tensor:
        return torch.cat([rms_norm(txt, txt_scale), _turned(rms_norm(img, img_scale), table)], dim=1)

    return _from_inputs(joint, txt, img, txt_scale, img_scale, table)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    """The last tokens of x (B, T, H, D) rotated: (even, odd) * cosine + (-odd, even) * sine, text with an angle of 0.

    Flipping the pairs is only another way to read x; stacking two results would be a pass of its own.
    """
    text = x.shape[1] - table.shape[1]
    cosine = F.pad(table[..., :1], (0, 0, 0, 0, text, 0), value=1.0)[:, :, None]
    sine = F.pad(table[..., 1:], (0, 0, 0, 0, text, 0))[:, :, None]
    sign = 2 * torch.arange(2, device=x.device, dtype=table.dtype) - 1
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    return (pairs * cosine + pairs.flip(-1) * (sine * sign)).flatten(-2).to(x.dtype)


def _from_inputs(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Save nothing but the inputs: writing out the norms' statistics, too, would split the forward kernel in three."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Region:
    """A compiled function of tensors.

    any_length: one graph for any size of the first two axes of inputs that have more; otherwise one for each size.
    """

    def __init__(self, function: Callable, backend: str | Callable, any_length: bool = True):
        self.prepare = _of_any_length if any_length else lambda tensor: tensor
        self.compiled = torch.compile(
            function, backend=backend, fullgraph=True, isolate_recompiles=True, recompile_limit=VARIANTS
        )

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The function's outputs. Without a gradient to compute there is one graph, whatever the inputs require."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return self.compiled(*map(self.prepare, inputs))
        with torch.no_grad():
            return self.compiled(*(self.prepare(tensor.detach()) for tensor in inputs))


def _of_any_length(tensor: Tensor) -> Tensor:
    """Have the compiler treat batch and tokens as unknown from the start, not from the second bucket on."""
    if tensor.ndim > 2:
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])
    return tensor


def compile_elementwise(ops: Elementwise, backend: str | Callable = "inductor", any_length: bool = True) -> None:
    """Replace the functions that all blocks of a model share; they are compiled in the first step that calls them.

    any_length: see `Region`.
    """
    region = lambda function: Region(function, backend, any_length)
    rotated, joint, clipped = region(plain_rotated_norm), region(plain_joint_norm), region(plain_gated_sum)
    ops.modulated_norm = region(plain_modulated_norm)
    ops.gated_norm = region(plain_gated_norm)
    # Without fp16's clipping this is one kernel already.
    ops.gated_sum = lambda x, gate, value: (clipped if x.dtype == torch.float16 else gated_sum)(x, gate, value)
    ops.rotated_norm = lambda x, scale, table: rotated(x, scale, _real(table))
    ops.joint_norm = lambda *inputs: joint(*inputs[:-1], _real(inputs[-1]))


def _real(table: Tensor) -> Tensor:
    """Complex (N, D/2) -> (1, N, D/2, 2)."""
    return torch.view_as_real(table)[None]
