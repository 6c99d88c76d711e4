"""Checkpoints of any shape that no file holds: random weights for a real step, mere shapes for a counted one."""

from __future__ import annotations

import torch
from torch import Tensor

from library.memory.precision import QUANTISED, STORAGES, is_quantised
from library.memory.storage import Tensors
from library.models.keymap import Entry, entries
from library.models.shape import FluxShape

DEVIATION = 0.02


class RandomWeights:
    """A checkpoint of this shape whose tensors are drawn when they are read, on the device."""

    def __init__(self, shape: FluxShape, device: torch.device):
        self.shape, self.entries, self.device = shape, entries(shape), device

    def read(self, entry: Entry) -> Tensor:
        """Weights with a deviation of 0.02, zero biases, scales of one."""
        drawn = torch.empty(entry.shape, device=self.device, dtype=torch.bfloat16)
        if entry.suffix == "bias":
            return drawn.zero_()
        return drawn.fill_(1.0) if len(entry.shape) == 1 else drawn.normal_(std=DEVIATION)

    def read_encoded(self, entry: Entry) -> None:
        """Nothing is stored quantised."""
        return None


class ShapesOnly:
    """A checkpoint without values, already in the precision it is wanted in: for fake tensors."""

    def __init__(self, shape: FluxShape, precision: str):
        self.shape, self.entries, self.precision = shape, entries(shape), precision

    def read(self, entry: Entry) -> Tensor:
        """A plain tensor."""
        return torch.empty(entry.shape, dtype=torch.bfloat16)

    def read_encoded(self, entry: Entry) -> Tensors | None:
        """The stored form of a weight that is quantised."""
        path, _, leaf = entry.name.rpartition(".")
        if self.precision not in QUANTISED or leaf != "weight" or not is_quantised(path):
            return None
        layout = STORAGES[self.precision].layout(entry.shape, torch.bfloat16)
        return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in layout.items()}
