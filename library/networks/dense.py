"""A whole weight that is trained: x_embedder in full, and the network kind `full`.

What is trained is the change of the weight, in fp32, starting at zero. The base weight keeps its precision, so a small
step is never lost in bf16 rounding, and weight decay pulls towards the base model instead of towards zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.linear import Adapter
from library.networks.dropout import Draws, Dropout
from library.networks.factors import Factors
from library.networks.parts import Rows


class DenseAdapter(Adapter):
    """y = W x + b + change x, on a range of rows; with ``bias`` also a change of the bias."""

    def __init__(
        self,
        module: str,
        rows: Rows,
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
        self.change = nn.Parameter(torch.zeros(rows[1] - rows[0], in_features, device=device))
        self.bias_change = nn.Parameter(torch.zeros(rows[1] - rows[0], device=device)) if bias else None

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        bias = None if self.bias_change is None else self.bias_change.to(x.dtype)
        update = F.linear(x, self.change.to(x.dtype), bias)
        mask = self.dropout.mask(self.name, update[..., :1], self.draws)
        if mask is not None:
            update = update * mask
        start, stop = self.rows
        if (start, stop) == (0, base_output.shape[-1]):
            return base_output + update
        return torch.cat([base_output[..., :start], base_output[..., start:stop] + update, base_output[..., stop:]], -1)

    def factors(self) -> list[tuple[Rows, Factors]]:
        """The change of the weight as it is."""
        return [(self.rows, Factors("full", {"diff": self.change.detach()}))]
