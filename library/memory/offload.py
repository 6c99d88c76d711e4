"""Where the inputs of checkpointed blocks wait for the backward pass: on the device, or in host memory."""

from __future__ import annotations

from torch import Tensor

Tensors = tuple[Tensor, ...]


class Kept:
    """The inputs of one block, kept for its backward pass."""

    def restore(self, ctx) -> Tensors:
        """The inputs again, on their device."""
        raise NotImplementedError


class Keeper:
    """Keeps block inputs between the forward and the backward pass."""

    def keep(self, ctx, tensors: Tensors) -> Kept:
        """Keep `tensors`, which the block is about to read."""
        raise NotImplementedError


class _Saved(Kept):
    def restore(self, ctx) -> Tensors:
        return ctx.saved_tensors


class OnDevice(Keeper):
    """Keeps them where they are."""

    def keep(self, ctx, tensors: Tensors) -> Kept:
        ctx.save_for_backward(*tensors)
        return _Saved()
