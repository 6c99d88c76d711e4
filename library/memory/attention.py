"""Attention through `scaled_dot_product_attention`, with a choice of its kernels."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS: dict[str, list[SDPBackend]] = {
    "auto": [],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "math": [SDPBackend.MATH],
}


class Attention:
    """Unmasked attention of (B, T, H, D) tensors with the chosen backend; 'auto' leaves the choice to torch."""

    def __init__(self, backend: str = "auto"):
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r}; there are {', '.join(BACKENDS)}")
        self.backend = backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, T, H, D) each -> (B, T, H, D)."""
        chosen = BACKENDS[self.backend]
        with sdpa_kernel(chosen) if chosen else contextlib.nullcontext():
            output = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return output.transpose(1, 2)


def available_backends(device: torch.device) -> list[str]:
    """The backends that work on this device, found by trying a tiny attention with gradients."""
    found = []
    for name in BACKENDS:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        x = torch.zeros(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True)
        with contextlib.suppress(RuntimeError):
            Attention(name)(x, x, x).sum().backward()
            found.append(name)
    return found
