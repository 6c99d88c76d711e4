"""A lane: copies between host and device that run beside the computation, and the points where one waits for the other.

On a CUDA device a lane is a stream of its own and a mark is an event. Elsewhere nothing runs beside anything: copies
happen at once and there is nothing to wait for. Everything that is copied ahead (weights in stream.py, activations in
offload.py) is ordered by these four methods alone, so a test can stand in for the device and look for races.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Mark = Any
"""A point in the work of the computation or of a lane: a `torch.cuda.Event`, or None where all work is done at once."""


class Lane:
    """Copies in order; this one on devices without streams, where they are done when `copy` returns."""

    def now(self) -> Mark:
        """The point that the computation has reached: all the work it was given so far."""
        return None

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy once the computation has passed `after`, and after the copies before it; returns when it has arrived.

        The caller keeps both tensors until the computation waits for that: their memory would be given away before.
        """
        target.copy_(source)
        return None

    def wait(self, mark: Mark) -> None:
        """The computation goes on only after `mark`."""

    def finish(self, mark: Mark) -> None:
        """This thread goes on only after `mark`."""


class CudaLane(Lane):
    """A CUDA stream beside the one that computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def now(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        mark.synchronize()


def lane_for(device: torch.device) -> Lane:
    """A new lane for copies to and from this device."""
    return CudaLane(device) if device.type == "cuda" and torch.cuda.is_available() else Lane()
