"""How the blocks of a model are executed: plainly or recomputed, with resident or streamed weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.memory.checkpoint import Segment, run, run_checkpointed
from library.memory.offload import Keeper, OnDevice
from library.memory.stream import Streamer

Tensors = tuple[Tensor, ...]


@dataclass
class BlockRunner:
    """Executes residual blocks, forward and backward, one after the other.

    checkpointing: keep only each block's inputs and compute the rest again in the backward pass.
    keeper: where those inputs wait. keep_attention: keep attention's outputs too, instead of attending again.
    streamer: brings the weights of streamed blocks; None if all are resident.
    """

    checkpointing: bool = False
    keeper: Keeper = field(default_factory=OnDevice)
    keep_attention: bool = False
    streamer: Streamer | None = None

    def begin(self) -> None:
        """Called before the first block of a forward pass."""
        self.keeper.begin()
        if self.streamer is not None:
            self.streamer.begin()

    def __call__(self, segment: Segment, index: int, inputs: Tensors) -> Tensors:
        """The outputs of block `index` of the model."""
        if self.streamer is not None:
            self.streamer.need(index, backward=False)
        if self.checkpointing and torch.is_grad_enabled():
            outputs = run_checkpointed(segment, inputs, self.keeper, self.keep_attention)
        else:
            outputs = run(segment, inputs)
        if self.streamer is not None:
            self._announce_backward(outputs, index)
        return outputs

    def _announce_backward(self, outputs: Tensors, index: int) -> None:
        """Have the block's weights back before the first of its gradients is computed."""
        streamer = self.streamer
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda _: streamer.need(index, backward=True))
