"""A slowly moving average of the trained weights, which is often better to look at than the last step's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average in float32, on the parameters' device or (`device="cpu"`) off the GPU."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, device: str | None = None):
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.averages = {name: p.detach().float().to(device or p.device, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights. The decay starts low, (1 + n) / (10 + n), so that the start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            average = self.averages[name]
            average.lerp_(parameter.detach().to(average.device, torch.float32), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the averages."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def load(self, averages: dict[str, Tensor], updates: int) -> None:
        """Restore what a state folder holds."""
        self.updates = updates
        for name, average in self.averages.items():
            average.copy_(averages[name])
