"""A whole weight that is trained: x_embedder in full, and the network kind `full`.

What is trained is the change of the weight, in fp32, starting at zero. The base weight keeps its precision, so a small
step is never lost in bf16 rounding, and weight decay pulls towards the base model instead of towards zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.linear import Adapter, Linear
from library.networks.arguments import Settings
from library.networks.dropout import Draws, Dropout
from library.networks.factors import Factors
from library.networks.parts import Rows
from library.networks.targets import Target


class DenseAdapter(Adapter):
    """y = W x + b + change x, on row ranges; with ``bias`` also a change of the bias."""

    def __init__(
        self,
        module: str,
        rows: list[Rows],
        in_features: int,
        device: torch.device,
        *,
        bias: bool = False,
        dropout: Dropout | None = None,
        draws: Draws | None = None,
    ):
        super().__init__()
        self.name = module
        self.rows = rows
        self.dropout = dropout or Dropout()
        self.draws = draws or Draws()
        self.export_rank: int | None = None
        height = sum(stop - start for start, stop in rows)
        self.change = nn.Parameter(torch.zeros(height, in_features, device=device))
        self.bias_change = nn.Parameter(torch.zeros(height, device=device)) if bias else None

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        bias = None if self.bias_change is None else self.bias_change.to(x.dtype)
        update = F.linear(x, self.change.to(x.dtype), bias)
        mask = self.dropout.mask(self.name, update[..., :1], self.draws)
        if mask is not None:
            update = update * mask
        if self.rows == [(0, base_output.shape[-1])]:
            return base_output + update
        pieces, position, used = [], 0, 0
        for start, stop in self.rows:
            pieces.append(base_output[..., position:start])
            pieces.append(base_output[..., start:stop] + update[..., used : used + stop - start])
            position, used = stop, used + stop - start
        return torch.cat([*pieces, base_output[..., position:]], dim=-1)

    @torch.no_grad()
    def clamp_norm(self, largest: float) -> tuple[int, float]:
        """Scale the change down to ``largest`` if it exceeds it; returns (whether it did, its norm after it)."""
        norm = float(self.change.norm())
        if norm > largest:
            self.change.mul_(largest / norm)
        return int(norm > largest), min(norm, largest)

    def factors(self) -> list[tuple[Rows, Factors]]:
        """The change of the weight as it is."""
        found, used = [], 0
        for start, stop in self.rows:
            found.append(((start, stop), Factors("full", {"diff": self.change.detach()[used : used + stop - start]})))
            used += stop - start
        return found


def make(settings: Settings, target: Target, linear: Linear, draws: Draws) -> DenseAdapter:
    """The kind `full`: every chosen weight trained whole."""
    rows = sorted(rows for group in target.groups for rows in group)
    dropout = Dropout(modules=settings.module_dropout)
    adapter = DenseAdapter(target.module, rows, target.in_features, linear.device, dropout=dropout, draws=draws)
    adapter.export_rank = settings.export_rank
    return adapter
