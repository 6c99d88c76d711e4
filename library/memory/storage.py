"""How a frozen weight is stored: the protocol, and the plain form (a bf16, fp16 or fp32 matrix).

A storage owns named tensors, so that streaming can lay them out in one flat buffer and rebind them to a slot on the
device. Precisions other than the plain one live in `precision.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Storage:
    """A frozen (out, in) weight as named tensors. Subclasses give `dequantized` and `encode`; faster paths may differ.

    tensors: what is stored, by name; streaming replaces the values by views of equal shape and dtype.
    """

    def __init__(self, shape: tuple[int, int], tensors: dict[str, Tensor]):
        self.shape = shape
        self.tensors = tensors

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(iter(self.tensors.values())).device

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight in `dtype`."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors for a new weight of this shape."""
        raise NotImplementedError

    def replace(self, weight: Tensor) -> None:
        """Store a new weight in the place of the old one."""
        for name, value in self.encode(weight).items():
            self.tensors[name].copy_(value)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.dequantized(x.dtype), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of x: grad W."""
        return grad @ self.dequantized(grad.dtype)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors with a function of `nn.Module._apply`, keeping each one's dtype."""
        for name, tensor in self.tensors.items():
            moved = fn(tensor)
            self.tensors[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class PlainStorage(Storage):
    """The weight as it is; used where streaming has to rebind it."""

    def __init__(self, weight: Tensor):
        super().__init__((weight.shape[0], weight.shape[1]), {"weight": weight})

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.tensors["weight"].to(dtype)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.to(self.tensors["weight"].dtype)}
