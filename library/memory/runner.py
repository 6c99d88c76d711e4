"""How the blocks of a model are executed: plainly or recomputed, with resident or streamed weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.memory.checkpoint import Segment, run, run_checkpointed
from library.memory.offload import Keeper, OnDevice

Tensors = tuple[Tensor, ...]


@dataclass
class BlockRunner:
    """Executes residual blocks.

    checkpointing: keep only each block's inputs and compute the rest again in the backward pass.
    keeper: where those inputs wait.
    """

    checkpointing: bool = False
    keeper: Keeper = field(default_factory=OnDevice)

    def begin(self) -> None:
        """Called before the first block of a forward pass."""

    def __call__(self, segment: Segment, index: int, inputs: Tensors) -> Tensors:
        """The outputs of block `index` of the model."""
        if self.checkpointing and torch.is_grad_enabled():
            return run_checkpointed(segment, inputs, self.keeper)
        return run(segment, inputs)
