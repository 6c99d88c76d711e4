"""What is tried out before the first step: the largest batch, and the largest pictures made between steps.

Every process tries its batch; pictures are the main one's. Nothing here draws; no weight, gradient or state changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.data.cached import HELD_OUT_BATCH
from library.models import cost
from library.models.probe import hold, probe_step
from library.previews import Trial
from library.training.loop import Trainer
from library.training.out_of_memory import Moment
from library.training.pictures import Painter
from library.training.site import Site

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Attempt:
    """One moment of the run and how it is tried out."""

    moment: Moment
    run: Callable[[], None]


class Probe:
    """The attempts of a run, in order; between `start` and `close` it holds what the run will hold later."""

    def __init__(self, site: Site, trainer: Trainer, painter: Painter | None):
        self.site, self.trainer, self.painter = site, trainer, painter
        self.held: list[Tensor] = []

    def attempts(self) -> list[Attempt]:
        """The optimizer's state beside the base, the largest batch, and the largest pictures if any are made."""
        width, height, batch = self.largest_batch()
        return [
            Attempt(Moment("the optimizer's state"), self._hold_state),
            Attempt(Moment(f"a batch of {batch} x {width} x {height} pixels"), self._step),
            *self._pictures(),
        ]

    def largest_batch(self) -> tuple[int, int, int]:
        """Width, height and size of the batch with the most tokens."""
        length = self.text_length
        members = self.site.dataset.listing.members
        sizes = {(*size, member.batch_size) for member in members for size in member.group[1]}
        return max(sizes, key=lambda size: size[2] * cost.tokens(size[0], size[1], length))

    @property
    def text_length(self) -> int:
        """T5's tokens."""
        return self.site.run.cache.t5xxl_max_token_length or self.site.base.defaults.t5xxl_max_token_length

    def close(self) -> None:
        """Let go of all that was held."""
        self.held.clear()
        if self.site.device.type == "cuda":
            # Once, and not between steps: what the probe leaves in the allocator's cache is cut to its placeholders'
            # sizes. Steps would split these segments, and neither the optimizer's real state nor the VAE would find
            # a whole one again.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.site.device)

    def _hold_state(self) -> None:
        if not self.site.run.memory.optimizer_offload:
            self.held += hold(self.trainer.parameters, self.missing_state())

    def missing_state(self) -> float:
        """Bytes per trained parameter of optimizer state that the first steps will allocate on the device."""
        name = self.trainer.trained.optimizer.choice.name
        there = sum(
            value.nbytes
            for optimizer in self.trainer.trained.optimizer.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.device == self.site.device
        )
        count = sum(parameter.numel() for parameter in self.trainer.parameters)
        return max(0.0, cost.OPTIMIZER_BYTES.get(name, 8) - there / max(1, count))

    def _step(self) -> None:
        trainer, run = self.trainer, self.site.run
        name = trainer.trained.optimizer.choice.name
        stepping = float(cost.STEP_BYTES.get(name, FLOAT32_BYTES))
        stepping = max(stepping, FLOAT32_BYTES if self.site.world.size > 1 else 0)
        stepping += 2.0 * (FLOAT32_BYTES - trainer.parameters[0].element_size())  # bfloat16 steps in float32
        if run.memory.optimizer_offload:
            stepping += cost.OPTIMIZER_BYTES.get(name, 8)
        width, height, batch = self.largest_batch()
        trainer.bucket = (width, height)
        with trainer.trained.network.at_rest():
            probe_step(
                trainer.predict.transformer, width, height, batch, self.text_length, trainer.parameters,
                pooled=self._pooled if trainer.predict.clip is not None else None,
                accumulates=run.training.gradient_accumulation_steps > 1, stepping=stepping,
            )  # fmt: skip

    def _pooled(self, batch: int) -> Tensor:
        predictor = self.trainer.predict
        assert predictor.clip is not None
        length = predictor.clip.config.max_position_embeddings
        return predictor.pooled(torch.zeros(batch, length, dtype=torch.long))

    def _pictures(self) -> list[Attempt]:
        if self.painter is None:
            return []
        found = []
        for name, width, height, batch, decoded in self._sizes():
            trial = Trial(self.trainer.predict.transformer, self.painter.previews, width, height, batch)
            size = f"{width} x {height} pixels"
            moment = Moment(f"{name} of {batch} x {size}", picture=True)
            found.append(Attempt(moment, lambda trial=trial: self._denoise(trial)))
            if decoded:
                found.append(Attempt(Moment(f"{name}, the VAE decoding {size}", True, True), trial.decode))
        return found

    def _sizes(self) -> list[tuple[str, int, int, int, bool]]:
        """What, width, height, how many at once, and whether they are decoded."""
        assert self.painter is not None
        dataset = self.site.dataset
        found = []
        area = lambda size: size[0] * size[1]
        if self.painter.previews.cached:
            masks = [preview.condition.mask.shape for preview in self.painter.previews.cached]
            found.append(("a preview", *max(((mask[-1], mask[-2]) for mask in masks), key=area), 1, True))
        if dataset.held_out_items and not self.site.sharded:
            bucket = max((dataset.reader.store.bucket(item.sizes[0][0]) for item in dataset.held_out_items), key=area)
            batch = min(HELD_OUT_BATCH, len(dataset.held_out_items))
            found.append(("held-out items", *bucket, batch, bool(self.painter.num_held_out)))
        return found

    def _denoise(self, trial: Trial) -> None:
        trained = self.trainer.trained
        set_aside = trained.ema is not None or trained.optimizer.schedule_free
        weights = hold(self.trainer.parameters, FLOAT32_BYTES if set_aside else 0)
        with trained.network.at_rest():
            trial.denoise(self.text_length)
        weights.clear()
