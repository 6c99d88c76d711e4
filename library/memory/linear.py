"""The one linear layer of the base model: its weight in any precision, and a hook for what is trained on top of it.

A network attaches itself by setting `Linear.adapter`. The base weight is frozen, so its input is never saved for the
backward pass, and the layer can hand out a *phantom* output: the gradient graph without the matrix product, for
recomputation where the value itself is never read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.storage import Storage


class Adapter(nn.Module):
    """What a network puts on a `Linear`: maps the base layer's output and its input to the new output.

    reads_base_output: the gradients depend on the *values* of `base_output` (as DoRA's do), so it must be computed.
    draws_random: `forward` draws from torch's global generators (dropout), so recomputation must replay their state.
    """

    reads_base_output = False
    draws_random = False

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        """(..., out) and (..., in) -> (..., out)."""
        raise NotImplementedError

    def on(self, linear: Linear, x: Tensor) -> Tensor:
        """The whole layer with this adapter: what `Linear.forward` calls.

        Override it to fuse the two; `linear.base(x)` is then fresh and may be written to, and
        `linear.input_gradient(grad)` is the base layer's backward pass.
        """
        return self(linear.base(x), x)

    def phantom(self, base_output: Tensor, x: Tensor) -> Tensor:
        """Like `forward`, but only the gradient graph of the result is used, never its values.

        Override it to save the arithmetic; `base_output` is a zero of stride 0 in the right shape.
        """
        return self(base_output, x)

    def phantom_on(self, linear: Linear, x: Tensor) -> Tensor:
        """Like `on`, with `phantom` in the place of `forward`. Override it together with `on`."""
        return self.phantom(linear.phantom_base(x), x)


class Linear(nn.Linear):
    """`nn.Linear` with a frozen weight in any precision and an optional adapter.

    With `storage` set, `weight` is None and the storage's tensors hold it (int8, fp8, nf4, or a streamed slot).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.adapter: Adapter | None = None
        self.storage: Storage | None = None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), the adapter applied."""
        return self.base(x) if self.adapter is None else self.adapter.on(self, x)

    def base(self, x: Tensor) -> Tensor:
        """The frozen layer alone."""
        if self.storage is not None:
            return _FrozenLinear.apply(x, self)
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.linear(x, weight, self._bias(x.dtype))

    def phantom(self, x: Tensor) -> Tensor:
        """The output's gradient graph; its values are zeros of stride 0 where nothing has to be computed."""
        return self.phantom_base(x) if self.adapter is None else self.adapter.phantom_on(self, x)

    def phantom_base(self, x: Tensor) -> Tensor:
        """The frozen layer's gradient graph alone."""
        return _PhantomLinear.apply(x, self)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the frozen layer's input: grad (..., out) W -> (..., in)."""
        if self.storage is not None:
            return self.storage.input_gradient(grad)
        return grad @ self.weight.to(grad.dtype)

    def can_be_phantom(self) -> bool:
        """Whether every gradient of this layer can be had without the value of its output."""
        trained = self.storage is None and self.weight.requires_grad
        return not trained and (self.adapter is None or not self.adapter.reads_base_output)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The full (out, in) weight in `dtype`, whatever it is stored as."""
        if self.storage is None:
            return self.weight.detach().to(dtype)
        return self.storage.dequantized(dtype)

    def add_to_weight(self, delta: Tensor) -> None:
        """Merge a change (out, in) into the stored base weight, requantising where it is quantised."""
        weight = self.dequantized(torch.float32)
        merged = weight + delta.to(device=weight.device, dtype=torch.float32)
        if self.storage is None:
            with torch.no_grad():
                self.weight.copy_(merged.to(self.weight.dtype))
        else:
            self.storage.replace(merged)

    @property
    def device(self) -> torch.device:
        """Where the layer computes (a streamed weight is kept elsewhere)."""
        if self.bias is not None:
            return self.bias.device
        return self.weight.device if self.storage is None else self.storage.device

    def set_storage(self, storage: Storage) -> None:
        """Hold the weight in `storage` from now on, and drop the plain one."""
        if storage.shape != (self.out_features, self.in_features):
            raise ValueError(f"storage of shape {storage.shape} for a linear {self.out_features} x {self.in_features}")
        self.weight = None
        self.storage = storage

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return self.bias if self.bias is None or self.bias.dtype == dtype else self.bias.to(dtype)

    def _apply(self, fn, recurse: bool = True):
        """Moves (`to`, `cuda`) reach the storage's tensors too; they keep their own precision."""
        super()._apply(fn, recurse)
        if self.storage is not None:
            self.storage.apply(fn)
        return self


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a stored weight: saves nothing, and reads the weight again when the gradient is wanted."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: Linear) -> Tensor:
        ctx.linear = linear
        return linear.storage.linear(x, linear._bias(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.input_gradient(grad) if ctx.needs_input_grad[0] else None, None


class _PhantomLinear(torch.autograd.Function):
    """The backward pass of the frozen layer behind an output that was never computed."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: Linear) -> Tensor:
        ctx.linear = linear
        return x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.input_gradient(grad) if ctx.needs_input_grad[0] else None, None
