"""Attention through `scaled_dot_product_attention`, with a choice of its kernels.

With checkpointing, attention's output can be kept instead of computed again: `remembering` records the outputs of a
block's first run, `recalling` hands them out in the second one and gives the same gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
Record = tuple
"""The outputs of one flash attention: the result first, then what its backward pass asks for."""


class Attention:
    """Unmasked attention of (B, T, H, D) tensors with the chosen backend; 'auto' leaves the choice to torch."""

    def __init__(self, backend: str = "auto"):
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r}; there are {', '.join(BACKENDS)}")
        self.backend = backend
        self._recording: list[Record] | None = None
        self._recalled: list[Record] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, T, H, D) each -> (B, T, H, D)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self._recalled is not None:
            return _Recalled.apply(q, k, v, self._recalled.pop(0)).transpose(1, 2)
        if self._recording is not None:
            self._recording.append(_flash(q, k, v))
            return self._recording[-1][0].transpose(1, 2)
        chosen = BACKENDS[self.backend]
        with sdpa_kernel(chosen) if chosen else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[list[Record]]:
        """Record what attention gives inside the block (flash attention, without gradients)."""
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    @contextlib.contextmanager
    def recalling(self, records: list[Record]) -> Iterator[None]:
        """Answer from the records, in their order, inside the block."""
        self._recalled = list(records)
        try:
            yield
        finally:
            self._recalled = None


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Record:
    if q.device.type == "cpu":
        return tuple(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False))
    return tuple(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False))


class _Recalled(torch.autograd.Function):
    """Attention whose output is known already."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, record: Record) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.record = record
        return record[0].view_as(record[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        out, logsumexp, *rest = ctx.record
        if q.device.type == "cpu":
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, logsumexp, 0.0, False
            )
            return *gradients, None
        cumulative_q, cumulative_k, longest_q, longest_k, seed, offset = rest[:6]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, logsumexp, cumulative_q, cumulative_k, longest_q, longest_k, 0.0, False, seed, offset
        )
        return *gradients, None


def can_remember(kind: str, compute: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Whether flash attention, which gives what is to be remembered, exists for a kind of device and a dtype.

    compute: an NVIDIA card's compute capability; None where that does not apply.
    """
    if kind == "cpu":
        return True
    return kind == "cuda" and dtype in (torch.bfloat16, torch.float16) and (compute is None or compute >= (8, 0))


def available_backends(device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that work on this device and dtype, found by trying a tiny attention with gradients."""
    found = []
    for name in BACKENDS:
        x = torch.zeros(1, 16, 2, 128, device=device, dtype=dtype, requires_grad=True)
        with contextlib.suppress(RuntimeError):
            Attention(name)(x, x, x).sum().backward()
            found.append(name)
    return found
