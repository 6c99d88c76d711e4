"""Rotary position embedding over FLUX's three axes, applied to queries and keys of image tokens.

Text tokens have the ids (0, 0, 0), whose rotation is the identity, so they are skipped. Angles are computed in
float64 and the rotation in float32 (or in float64 for float64 inputs), as diffusers' `FluxPosEmbed` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000


def rotation_table(ids: Tensor, axes_dim: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Position ids (N, axes) -> every pair's rotation as a complex number, (N, D/2), for activations of `dtype`."""
    angles = []
    for axis, width in enumerate(axes_dim):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(torch.outer(ids[:, axis].double(), THETA**-exponents))
    angle = torch.cat(angles, dim=-1)
    table = torch.complex(angle.cos(), angle.sin())
    return table if dtype == torch.float64 else table.to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the last tokens of x (B, T, H, D), as many as the table (N, D/2) has, in place; returns x."""
    return _Rotate.apply(x, table)


class _Rotate(torch.autograd.Function):
    """The rotation needs no saved activation: its backward pass is the opposite rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        ctx.mark_dirty(x)
        image = x[:, x.shape[1] - table.shape[0] :]
        image.copy_(_rotated(image, table))
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        text = grad.shape[1] - ctx.table.shape[0]
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        result[:, :text].copy_(grad[:, :text])
        result[:, text:].copy_(_rotated(grad[:, text:], ctx.table.conj()))
        return result, None


def join_rotated(text: Tensor, image: Tensor, table: Tensor) -> Tensor:
    """cat([text, rotated image], 1) of (B, L, H, D) and (B, N, H, D): the rotation writes where the image goes."""
    return _JoinRotated.apply(text, image, table)


class _JoinRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text: Tensor, image: Tensor, table: Tensor) -> Tensor:
        ctx.table, ctx.text = table, text.shape[1]
        joined = image.new_empty(image.shape[0], text.shape[1] + image.shape[1], *image.shape[2:])
        joined[:, : ctx.text].copy_(text)
        joined[:, ctx.text :].copy_(_rotated(image, table))
        return joined

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[:, : ctx.text], _rotated(grad[:, ctx.text :], ctx.table.conj()).to(grad.dtype), None


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """(B, N, H, D) rotated by the complex table (N, D/2)."""
    real = torch.float64 if table.dtype == torch.complex128 else torch.float32
    pairs = torch.view_as_complex(x.to(real).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)
