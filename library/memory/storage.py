"""How a frozen weight is stored: as named tensors that streaming can lay out in one buffer and bind to a slot.

Here are the protocol and the plain form (a matrix in bf16, fp16 or fp32); the quantised forms are in `precision.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
FEW = 16
"""Vectors up to which a product on a CPU is bound by reading the weight, and not by arithmetic."""
STRIP = 3 << 18
"""Weights decoded at once for a few vectors: what stays in a core's cache until it is multiplied."""


class Storage:
    """A frozen (out, in) weight.

    home: the stored tensors by name; they are the truth, wherever they live.
    bound: the tensors to compute with now: `home`, or views of a slot that streaming has filled from it.
    changed: called after `replace`, so that a copy in a slot is not used any more.
    """

    def __init__(self, shape: tuple[int, int], tensors: Tensors):
        self.shape = shape
        self.home = tensors
        self.bound = tensors
        self.changed: Callable[[], None] | None = None

    @classmethod
    def layout(cls, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """Shape and dtype of every stored tensor for a weight of this shape; `dtype` is that of plain weights."""
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: Tensor, layout: Layout) -> Tensors:
        """The stored tensors of a weight, on its device."""
        raise NotImplementedError

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight in `dtype` from stored tensors."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight in `dtype`, from where it is kept."""
        return self.decode(self.home, dtype)

    def replace(self, weight: Tensor) -> None:
        """Store a new weight in the place of the old one."""
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.home.items()}
        for name, value in self.encode(weight, layout).items():
            self.home[name].copy_(value)
        if self.changed is not None:
            self.changed()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        if not self.takes_few(x):
            return F.linear(x, self.decode(self.bound, x.dtype), bias)
        product = self.few(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return product if bias is None else product + bias

    def takes_few(self, x: Tensor) -> bool:
        """Whether `few` does this product; decided by device, dtype and shape alone."""
        on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
        return on_cpu and x.numel() <= FEW * x.shape[-1]

    def few(self, x: Tensor) -> Tensor:
        """x (B, in) W^T for a few vectors on a CPU, where writing a decoded weight to RAM would cost the most."""
        product = x.new_empty(len(x), self.shape[0])
        for rows, weight in self.strips(x.dtype):
            product[:, rows] = F.linear(x, weight)
        return product

    def strips(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight to compute with in `dtype`, a strip of rows at a time (see `strips_of`)."""
        raise NotImplementedError

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of x: grad W."""
        return grad @ self.decode(self.bound, grad.dtype)

    def bind(self, tensors: Tensors) -> None:
        """Compute with these copies of the stored tensors from now on."""
        self.bound = tensors

    def rehome(self, tensors: Tensors) -> None:
        """Keep the weight in these tensors (equal copies) from now on."""
        self.home = self.bound = tensors

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors with a function of `nn.Module._apply`, keeping each one's dtype."""
        moved = {}
        for name, tensor in self.home.items():
            target = fn(tensor)
            moved[name] = target if target.dtype == tensor.dtype else tensor.to(target.device)
        self.rehome(moved)

    @property
    def device(self) -> torch.device:
        """Where the weight is kept."""
        return next(iter(self.home.values())).device

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.home.values())


class PlainStorage(Storage):
    """The weight as it is; used where streaming has to bind it."""

    @classmethod
    def layout(cls, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        return {"weight": (shape, dtype)}

    @classmethod
    def encode(cls, weight: Tensor, layout: Layout) -> Tensors:
        return {"weight": weight.to(layout["weight"][1])}

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return tensors["weight"].to(dtype)

    def takes_few(self, x: Tensor) -> bool:
        return False


def strips_of(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of a weight, a cacheful at a time: a multiple of 64, so that every strip starts with a block of NF4."""
    height = max(64, STRIP // shape[1] // 64 * 64)
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))
