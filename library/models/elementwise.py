"""The blocks' element-wise parts, fused by hand as far as torch's own operators go; `compiled.py` has them compiled.

Between its matrix products a block moves more bytes than the products do, and all of those parts are here. Gelu, also
where it joins attention, is one pass each way already, and no compiler does better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.checkpoint import gated_sum
from library.models.rope import join_rotated, rotate

EPSILON = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift, with (B, 1, h) vectors; `scale` already has its 1 added.

    With one sample the two vectors are the normalisation's own weight and bias, which is one pass instead of two.
    """
    width = (x.shape[-1],)
    if x.shape[0] == 1:
        return F.layer_norm(x, width, scale.flatten(), shift.flatten(), EPSILON)
    return torch.addcmul(shift, F.layer_norm(x, width, eps=EPSILON), scale)


def gated_norm(x: Tensor, gate: Tensor, value: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The next residual x + gate * value, and its `modulated_norm`."""
    x = gated_sum(x, gate, value)
    return x, modulated_norm(x, shift, scale)


def rotated_norm(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """RMSNorm(x) * scale over heads (B, T, H, D), its image tokens (the last of T) rotated by the table (N, D/2)."""
    return rotate(rms_norm(x, scale), table)


def joint_norm(txt: Tensor, img: Tensor, txt_scale: Tensor, img_scale: Tensor, table: Tensor) -> Tensor:
    """The streams (B, L, H, D) and (B, N, H, D), each with its own RMSNorm, as (B, L + N, H, D); the image rotated."""
    return join_rotated(rms_norm(txt, txt_scale), rms_norm(img, img_scale), table)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm(x) * scale over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), scale, EPSILON)


def join_gelu(attended: Tensor, mlp: Tensor) -> Tensor:
    """cat([attended, gelu(mlp)], -1) without a separate copy of the activation."""
    return _JoinGelu.apply(attended, mlp)


class _JoinGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended: Tensor, mlp: Tensor) -> Tensor:
        ctx.save_for_backward(mlp)
        ctx.width = attended.shape[-1]
        joined = mlp.new_empty(*mlp.shape[:-1], ctx.width + mlp.shape[-1])
        joined[..., : ctx.width].copy_(attended)
        torch.ops.aten.gelu.out(mlp, approximate="tanh", out=joined[..., ctx.width :])
        return joined

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (mlp,) = ctx.saved_tensors
        grad_mlp = torch.ops.aten.gelu_backward(grad[..., ctx.width :], mlp, approximate="tanh")
        return grad[..., : ctx.width], grad_mlp


@dataclass
class Elementwise:
    """The functions that the blocks call and a compiler can improve on; one object shared by all blocks of a model."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated_norm
    gated_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = gated_norm
    gated_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = gated_sum
    rotated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated_norm
    joint_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = joint_norm
