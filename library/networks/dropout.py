"""Dropouts of a network, drawn from keys: a mask depends on (seed, micro-step, item, module) and on nothing else.

So a block that gradient checkpointing computes twice drops the same values twice, and neither resuming nor the number
of processes changes a mask.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.flow.draws import Key, generator, key_seed, uniform


@dataclass
class Draws:
    """The current step's key per item of the batch, shared by all adapters of a network. Empty: nothing is dropped."""

    items: tuple[int, ...] = field(default=())

    def begin(self, seed: int, micro_step: int, item_keys: tuple[Key, ...]) -> None:
        """Make the masks of this micro-step current; one key per item of the batch."""
        self.items = tuple(
            key_seed(seed, "network_dropout", micro_step, key, position) for position, key in enumerate(item_keys)
        )

    def rest(self) -> None:
        """Drop nothing from now on (previews, validation)."""
        self.items = ()


@dataclass(frozen=True)
class Dropout:
    """Shares that are dropped: of the down-projected values, of the ranks, and of whole modules."""

    values: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether anything is ever dropped."""
        return self.values > 0 or self.ranks > 0 or self.modules > 0

    def mask(self, name: str, hidden: Tensor, draws: Draws) -> Tensor | None:
        """Factors for ``hidden`` (B, ..., r): 0 where dropped, made up for elsewhere; None if nothing is dropped.

        A left-out module is not made up for, as in kohya's scripts.
        """
        if not draws.items or not self.acts:
            return None
        count = len(draws.items)
        assert hidden.shape[0] % count == 0, f"{hidden.shape[0]} rows for {count} items"
        masks = [self._item_mask(name, hidden[0], seed) for seed in draws.items]
        stacked = torch.stack(masks).to(device=hidden.device, dtype=hidden.dtype)
        return stacked.repeat_interleave(hidden.shape[0] // count, dim=0)

    def _item_mask(self, name: str, row: Tensor, seed: int) -> Tensor:
        mask = torch.ones(*(1,) * (row.ndim - 1), row.shape[-1])
        if self.modules and uniform(seed, name, "module") < self.modules:
            return mask.zero_()
        if self.ranks:
            kept = torch.rand(row.shape[-1], generator=generator(seed, name, "rank")) >= self.ranks
            mask = mask * kept / (1 - self.ranks)
        if self.values:
            kept = torch.rand(row.shape, generator=generator(seed, name, "value")) >= self.values
            mask = mask * kept / (1 - self.values)
        return mask
