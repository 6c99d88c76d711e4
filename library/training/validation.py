"""How good a network is on items it never trained on: the loss at fixed noise and fixed timesteps, and its pictures.

The training loss is mostly the luck of the drawn timesteps; here nothing is drawn anew, so two measurements differ by
the network alone. The part of the picture that has to change is measured apart from the part that must stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from library.data.batches import Batch
from library.flow import draws
from library.flow.velocity import distance, item_losses, mix, velocity_target
from library.training.objective import Predict, occurrences
from library.training.scores import HIGHER_IS_BETTER

_CHANGED = 0.5  # a latent cell counts as changed if half of it does
_METRIC_NAMES = {"loss": "validation_loss", "loss_changed": "validation_loss_changed"}


@dataclass
class Mean:
    """A running mean."""

    total: float = 0.0
    count: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Take in values."""
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        """The mean so far."""
        return self.total / self.count


@dataclass
class Losses:
    """Means over items and timesteps, by area."""

    whole: Mean = field(default_factory=Mean)
    changed: Mean = field(default_factory=Mean)
    unchanged: Mean = field(default_factory=Mean)

    def numbers(self) -> dict[str, float]:
        """As metrics; areas that no item has are left out."""
        named = {"": self.whole, "_changed": self.changed, "_unchanged": self.unchanged}
        return {f"validation_loss{name}": mean.value for name, mean in named.items() if mean.count}


@torch.no_grad()
def measure(
    predict: Predict,
    batches: Iterable[Batch],
    timesteps: tuple[float, ...],
    seed: int,
    guidance: float,
    device: torch.device,
) -> dict[str, float]:
    """Mean squared error of the velocity over all items, at every one of `timesteps`."""
    losses = Losses()
    for batch in batches:
        keys = occurrences(batch.item_keys)
        shape = tuple(batch.mean.shape[1:])
        noise = torch.stack([draws.normal(shape, seed, "validation", key) for key, _ in keys]).to(device)
        latents = batch.mean.float().to(device)
        changed = (batch.changed.to(device) >= _CHANGED).float()
        scale = torch.full((len(batch),), guidance, device=device)
        for value in timesteps:
            t = torch.full((len(batch),), value, device=device)
            predicted = predict(mix(latents, noise, t), t, batch, scale)
            errors = distance(predicted, velocity_target(latents, noise), "l2")
            losses.whole.add(item_losses(errors))
            for mean, area in ((losses.changed, changed), (losses.unchanged, 1 - changed)):
                present = area.flatten(1).sum(1) > 0
                mean.add(item_losses(errors, area)[present])
    return losses.numbers()


def is_measured(metric: str, values: dict[str, float]) -> bool:
    """Whether a measurement has a value of `metric`: pictures may be left out, and not every item changes."""
    return _key(metric) in values


def _key(metric: str) -> str:
    return _METRIC_NAMES.get(metric, f"validation_{metric}")


def gain(metric: str, values: dict[str, float], best: float | None) -> float | None:
    """The value of `metric` if it is better than `best`, else None."""
    value = values.get(_key(metric))
    if value is None:
        return None
    better = best is None or (value > best if metric in HIGHER_IS_BETTER else value < best)
    return value if better else None
