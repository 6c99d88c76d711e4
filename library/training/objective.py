"""What one micro-step computes: draw t and noise for every item, predict the velocity, weigh the error.

Every draw is keyed by (seed, purpose, micro-step, item, occurrence), so it does not matter who draws it, or when.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.config.tables import TrainingTable
from library.data.batches import Batch
from library.flow import draws
from library.flow.timesteps import TimestepChoice, stratified, timesteps
from library.flow.velocity import distance, huber_threshold, item_losses, loss_weighting, mix, velocity_target

Predict = Callable[[Tensor, Tensor, Batch, Tensor], Tensor]
"""(noisy, t, batch, guidance) -> velocity, the shape of noisy."""

LATENT_SCALE = 8
MOST_SAID = 8  # items without any area that counts
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a batch stands in its step: `first` of `total` items that all processes see in this micro-step."""

    micro_step: int
    first: int = 0
    total: int = 0


@dataclass(frozen=True)
class Drawn:
    """The random part of a micro-step: clean latents and noise (B, 16, h, w), t and guidance (B,)."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    guidance: Tensor


class Objective:
    """The loss of a configuration."""

    def __init__(self, table: TrainingTable, seed: int):
        self.table = table
        self.seed = seed
        self.choice = timestep_choice(table)
        self._said: set[str] = set()

    def losses(self, predict: Predict, batch: Batch, place: Place, device: torch.device) -> Tensor:
        """Each item's weighted loss, (B,) float32, with its gradient."""
        drawn = self.draw(batch, place)
        latents, noise = drawn.latents.to(device), drawn.noise.to(device)
        t = drawn.t.to(device)
        predicted = predict(mix(latents, noise, t), t, batch, drawn.guidance)
        errors = self.errors(predicted, velocity_target(latents, noise), t)
        area = loss_area(self.table.masked_loss, self.table.masked_loss_floor, batch)
        if area is not None:
            self._say_what_teaches_nothing(area, batch)
        losses = item_losses(errors, None if area is None else area.to(device))
        return losses * loss_weighting(self.choice.weighting_scheme, t) * self.item_weights(batch).to(device)

    def _say_what_teaches_nothing(self, area: Tensor, batch: Batch) -> None:
        """Warn, once each and of the first few, about items whose loss counts nowhere."""
        for key, total in zip(batch.item_keys, area.flatten(1).sum(1).tolist()):
            if total == 0 and key not in self._said and len(self._said) < MOST_SAID:
                self._said.add(key)
                log.warning(
                    "%s teaches nothing: masked_loss = %s leaves no part of it (masked_loss_floor above 0 would)",
                    key, self.table.masked_loss,
                )  # fmt: skip

    def errors(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The element-wise loss."""
        table = self.table
        threshold = None
        if table.loss_type in ("huber", "smooth_l1"):
            threshold = huber_threshold(table.huber_schedule, table.huber_c, table.huber_scale, t)
        return distance(predicted, target, table.loss_type, threshold)

    def item_weights(self, batch: Batch) -> Tensor:
        """(B,) weight of every item."""
        return batch.loss_weight.float()

    def draw(self, batch: Batch, place: Place) -> Drawn:
        """All random numbers of this micro-step's items."""
        keys = occurrences(batch.item_keys)
        shape = tuple(batch.mean.shape[1:])
        noise = self._normal("noise", keys, shape, place)
        latents = batch.mean.float()
        if batch.std is not None:
            latents = latents + batch.std.float() * self._normal("latent", keys, shape, place)
        return Drawn(latents, noise, *self.draw_times(batch, place))

    def draw_times(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """t and guidance (B,) of this micro-step's items: all that modulation depends on beside the text."""
        keys = occurrences(batch.item_keys)
        num_tokens = batch.mean.shape[-2] * batch.mean.shape[-1] // 4
        t = timesteps(self._uniform_for_t(keys, place), self.choice, num_tokens)
        return t, self._guidance(keys, place)

    def _normal(self, purpose: str, keys: list[tuple[str, int]], shape: tuple[int, ...], place: Place) -> Tensor:
        return torch.stack([draws.normal(shape, self.seed, purpose, place.micro_step, *key) for key in keys])

    def _uniform(self, purpose: str, keys: list[tuple[str, int]], place: Place) -> Tensor:
        values = [draws.uniform(self.seed, purpose, place.micro_step, *key) for key in keys]
        return torch.tensor(values, dtype=torch.float64)

    def _uniform_for_t(self, keys: list[tuple[str, int]], place: Place) -> Tensor:
        uniform = self._uniform("t", keys, place)
        if not self.table.stratified_timesteps:
            return uniform
        total = place.total or len(keys)
        order = draws.permutation(total, self.seed, "strata", place.micro_step)
        return stratified(uniform, torch.tensor(order[place.first : place.first + len(keys)]), total)

    def _guidance(self, keys: list[tuple[str, int]], place: Place) -> Tensor:
        if self.table.guidance_scale_range is None:
            return torch.full((len(keys),), self.table.guidance_scale)
        low, high = self.table.guidance_scale_range
        return (low + (high - low) * self._uniform("guidance", keys, place)).float()


def timestep_choice(table: TrainingTable) -> TimestepChoice:
    """The keys that decide t."""
    return TimestepChoice(
        timestep_sampling=table.timestep_sampling,
        weighting_scheme="none" if table.weighting_scheme == "uniform" else table.weighting_scheme,
        logit_mean=table.logit_mean,
        logit_std=table.logit_std,
        mode_scale=table.mode_scale,
        sigmoid_scale=table.sigmoid_scale,
        discrete_flow_shift=table.discrete_flow_shift,
        min_timestep=table.min_timestep,
        max_timestep=table.max_timestep,
    )


def occurrences(item_keys: tuple[str, ...]) -> list[tuple[str, int]]:
    """Every item's key with its count so far in the batch: an item that comes twice is drawn twice."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in item_keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def loss_area(kind: str, floor: float, batch: Batch) -> Tensor | None:
    """(B, 1, h, w) weights of the picture's parts, 1 where the loss counts and `floor` elsewhere; None: everywhere.

    `mask` and `half` are the repainted area, which in a spatial canvas is the target half. `changed` is where the pair
    differs, found when caching.
    """
    if kind == "none":
        return None
    area = batch.changed if kind == "changed" else F.avg_pool2d(batch.condition.mask.float(), LATENT_SCALE)
    return floor + (1 - floor) * area.float()
