"""The blocks' element-wise parts: written for eager execution, or as plain functions that a compiler fuses.

Between its matrix products a block moves more bytes than the products do. Eager execution fuses by hand what torch
has fused operators for; compiled, each part becomes one kernel forward and one backward (RMSNorm and RoPE together).
Compiling these functions, and not whole blocks, works with every precision, streaming, adapters and checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.rope import rotate

EPSILON = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift, with (B, 1, h) vectors; `scale` already has its 1 added.

    With one sample the two vectors are the normalisation's own weight and bias, which is one pass instead of two.
    """
    width = (x.shape[-1],)
    if x.shape[0] == 1:
        return F.layer_norm(x, width, scale.flatten(), shift.flatten(), EPSILON)
    return torch.addcmul(shift, F.layer_norm(x, width, eps=EPSILON), scale)


def rotated_norm(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """RMSNorm(x) * scale over heads (B, T, H, D), its image tokens (the last of T) rotated by the table (N, D/2)."""
    return rotate(F.rms_norm(x, (x.shape[-1],), scale, EPSILON), table)


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


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulated_norm` for a compiler."""
    return F.layer_norm(x, (x.shape[-1],), eps=EPSILON) * scale + shift


def plain_rotated_norm(x: Tensor, scale: Tensor, cosine_sine: Tensor) -> Tensor:
    """`rotated_norm` for a compiler: real arithmetic, nothing in place. cosine_sine: (N, D/2, 2)."""
    x = F.rms_norm(x, (x.shape[-1],), scale, EPSILON)
    text = x.shape[1] - cosine_sine.shape[0]
    cosine, sine = cosine_sine[:, None].unbind(-1)
    even, odd = x[:, text:].to(cosine.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)
    return torch.cat([x[:, :text], turned.to(x.dtype)], dim=1)


def plain_join_gelu(attended: Tensor, mlp: Tensor) -> Tensor:
    """`join_gelu` for a compiler."""
    return torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)


@dataclass
class Elementwise:
    """The functions that the blocks call; one object shared by all blocks of a model."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated_norm
    rotated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated_norm
    join_gelu: Callable[[Tensor, Tensor], Tensor] = join_gelu

    def compile(self, backend: str) -> None:
        """Replace the functions by compiled ones. They are compiled by the first step of each new bucket size."""
        compiled = torch.compile(plain_rotated_norm, backend=backend)
        self.modulated_norm = torch.compile(plain_modulated_norm, backend=backend)
        self.rotated_norm = lambda x, scale, table: compiled(x, scale, torch.view_as_real(table))
        self.join_gelu = torch.compile(plain_join_gelu, backend=backend)
