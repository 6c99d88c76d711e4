"""LoRA on one linear, in either layout: y = W x + b + scale * up (down x).

`down` is (pairs * rank, in) and `up` is (trained rows, rank). In the fused layout one pair covers all trained rows of a
fused linear (q, k, v share their down-projection); in the split layout every part has its own pair, and the parts'
down-projections are still one matrix product. The update is added by a single addmm on the base output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.flow.draws import generator
from library.memory.linear import Adapter, Linear
from library.networks import factors as arithmetic
from library.networks.arguments import Settings
from library.networks.dropout import Draws, Dropout
from library.networks.factors import Factors
from library.networks.parts import Rows
from library.networks.targets import Target


@dataclass(frozen=True)
class Pair:
    """One down/up pair: columns ``hidden`` of the down-projected values, rows ``up`` of `up`, output ``rows``."""

    hidden: Rows
    up: Rows
    rows: Rows


class LoraAdapter(Adapter):
    """A LoRA for one `Target`. Its weights are fp32 whatever the base's precision; arithmetic follows the input's."""

    def __init__(self, target: Target, scale: float, dropout: Dropout, draws: Draws, device: torch.device):
        super().__init__()
        self.target = target
        self.name = target.module
        self.rank = target.rank
        self.scale = scale
        self.dropout = dropout
        self.draws = draws
        self.pairs = _pairs(target)
        self.down = nn.Parameter(torch.zeros(len(target.groups) * target.rank, target.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(target.trained_rows, target.rank, device=device))
        self.register_buffer("start_down", None)
        self.register_buffer("start_up", None)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """PiSSA's start (down, up), which is taken off again so that training begins at the base model."""
        return None if self.start_down is None else (self.start_down, self.start_up)

    def on(self, linear: Linear, x: Tensor) -> Tensor:
        """The layer with its LoRA: (..., in) -> (..., out)."""
        return _LoraLinear.apply(x, self.down, self.up, self, linear, False)

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        """The same on a base output that is already there, which is left as it is."""
        hidden = self.project(x)
        output = base_output.clone()
        for pair in self.pairs:
            columns = hidden[..., pair.hidden[0] : pair.hidden[1]]
            change = F.linear(columns, self.up[pair.up[0] : pair.up[1]].to(columns.dtype))
            output[..., pair.rows[0] : pair.rows[1]] += change * self.scale
        if self.start is not None:
            self.add_update(output, F.linear(x, self.start[0].to(x.dtype)), self.start[1], -self.scale)
        return output

    def phantom_on(self, linear: Linear, x: Tensor) -> Tensor:
        """The gradient graph of `on` without its largest products; its values are zeros."""
        return _LoraLinear.apply(x, self.down, self.up, self, linear, True)

    def project(self, x: Tensor) -> Tensor:
        """The down-projected values, dropouts applied."""
        hidden = F.linear(x, self.down.to(x.dtype))
        mask = self.dropout.mask(self.name, hidden, self.draws)
        return hidden if mask is None else hidden * mask

    def add_update(self, output: Tensor, hidden: Tensor, up: Tensor, scale: float) -> None:
        """output[rows] += scale * hidden up^T, in place, for every pair."""
        flat = output.view(-1, output.shape[-1])
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        up = up.to(hidden.dtype)
        for pair in self.pairs:
            rows, columns = flat[:, slice(*pair.rows)], flat_hidden[:, slice(*pair.hidden)]
            rows.addmm_(columns, up[slice(*pair.up)].t(), alpha=scale)

    def hidden_gradient(self, grad: Tensor, up: Tensor) -> Tensor:
        """Gradient of the down-projected values (N, pairs * rank), from that of the output (N, out)."""
        pieces = {pair.hidden: grad.new_empty(0) for pair in self.pairs}
        for pair in self.pairs:
            piece = grad[:, slice(*pair.rows)] @ up[slice(*pair.up)]
            pieces[pair.hidden] = piece if pieces[pair.hidden].numel() == 0 else pieces[pair.hidden] + piece
        joined = list(pieces.values())
        hidden = joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)
        return hidden if self.scale == 1 else hidden.mul_(self.scale)

    def up_gradient(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of `up` (trained rows, rank), from that of the output (N, out) and the down-projected values."""
        pieces = [grad[:, slice(*pair.rows)].t() @ hidden[:, slice(*pair.hidden)] for pair in self.pairs]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return (joined if self.scale == 1 else joined.mul_(self.scale)).to(self.up.dtype)

    @torch.no_grad()
    def initialise(self, method: str, seed: int, linear: Linear) -> None:
        """Set the start: ``gaussian`` (std 1/rank), ``kaiming`` (as nn.Linear), or ``pissa`` from the base weight.

        Every start is the identity: `up` is zero, or the start's own product is taken off again.
        """
        if method == "pissa":
            self._initialise_pissa(seed, linear)
            return
        draw = generator(seed, "network_init", self.name)
        if method == "gaussian":
            values = torch.randn(self.down.shape, generator=draw) / self.rank
        else:
            bound = self.target.in_features**-0.5
            values = (torch.rand(self.down.shape, generator=draw) * 2 - 1) * bound
        self.down.copy_(values)
        self.up.zero_()

    def _initialise_pissa(self, seed: int, linear: Linear) -> None:
        """The base weight's largest singular directions, found by subspace iteration from a keyed start."""
        weight = linear.dequantized(torch.float32)
        for index, group in enumerate(self.target.groups):
            rows = torch.cat([weight[start:stop] for start, stop in group])
            left, values, right = arithmetic.leading_directions(
                rows, self.rank, generator(seed, "pissa", self.name, index)
            )
            root = (values / self.scale).sqrt()
            members = [pair for pair in self.pairs if pair.hidden[0] == index * self.rank]
            self.down[index * self.rank : (index + 1) * self.rank] = right.t() * root[:, None]
            self.up[members[0].up[0] : members[-1].up[1]] = left * root
        self.start_down, self.start_up = self.down.detach().clone(), self.up.detach().clone()

    def factors(self) -> list[tuple[Rows, Factors]]:
        """The change of the weight as LoRAs on row ranges, alpha = rank and the scale folded in."""
        alpha = self.scale * self.rank
        found = []
        for index, group in enumerate(self.target.groups):
            members = [pair for pair in self.pairs if pair.hidden[0] == index * self.rank]
            up = self.up[members[0].up[0] : members[-1].up[1]]
            down = self.down[index * self.rank : (index + 1) * self.rank]
            change = arithmetic.folded(arithmetic.lora(down.detach(), up.detach(), alpha))
            if self.start is not None:
                start = arithmetic.lora(
                    self.start[0][index * self.rank : (index + 1) * self.rank],
                    self.start[1][members[0].up[0] : members[-1].up[1]],
                    alpha,
                )
                change = arithmetic.stacked(change, start, -1.0)
            found += _by_rows(group, change)
        return found

    def delta_norms(self) -> list[Tensor]:
        """Frobenius norm of each pair's change, without building it: |up down|^2 = sum of (up^T up) * (down down^T)."""
        norms = []
        for down, up in self.group_weights():
            norms.append(((up.t() @ up) * (down @ down.t())).sum().clamp_min(0).sqrt() * self.scale)
        return norms

    @torch.no_grad()
    def clamp_norm(self, largest: float) -> tuple[int, float]:
        """Scale down pairs whose change exceeds ``largest``; returns how many were, and the largest norm after it."""
        clamped, norms = 0, self.delta_norms()
        for (down, up), norm in zip(self.group_weights(), norms):
            if norm > largest:
                down *= (largest / norm).sqrt()
                up *= (largest / norm).sqrt()
                clamped += 1
        return clamped, min(largest, max(float(norm) for norm in norms))

    def forget_start(self) -> None:
        """Drop PiSSA's start: the values come from elsewhere."""
        self.start_down = self.start_up = None

    def group_weights(self) -> list[tuple[Tensor, Tensor]]:
        """The (down, up) views of every pair, to be read or written in place."""
        weights = []
        for index in range(len(self.target.groups)):
            members = [pair for pair in self.pairs if pair.hidden[0] == index * self.rank]
            down = self.down.data[index * self.rank : (index + 1) * self.rank]
            weights.append((down, self.up.data[members[0].up[0] : members[-1].up[1]]))
        return weights


def _by_rows(group: tuple[Rows, ...], change: Factors) -> list[tuple[Rows, Factors]]:
    """A fused pair's change on each of its row ranges."""
    if len(group) == 1:
        return [(group[0], change)]
    found, position = [], 0
    for start, stop in group:
        up = change.tensors[arithmetic.UP][position : position + stop - start]
        found.append(((start, stop), arithmetic.lora(change.tensors[arithmetic.DOWN], up)))
        position += stop - start
    return found


def _pairs(target: Target) -> tuple[Pair, ...]:
    pairs, position = [], 0
    for index, group in enumerate(target.groups):
        for start, stop in group:
            hidden = (index * target.rank, (index + 1) * target.rank)
            pairs.append(Pair(hidden, (position, position + stop - start), (start, stop)))
            position += stop - start
    return tuple(pairs)


class _LoraLinear(torch.autograd.Function):
    """Base layer and LoRA in one node: the update is added into the fresh base output, and in the backward pass the
    LoRA's share of the input's gradient into the base's, so neither costs a pass over the activations of its own."""

    @staticmethod
    def forward(
        ctx, x: Tensor, down: Tensor, up: Tensor, adapter: LoraAdapter, linear: Linear, phantom: bool
    ) -> Tensor:
        hidden, mask, low_down = _projected(adapter, x, down)
        low_up = up.to(hidden.dtype)
        ctx.save_for_backward(x, hidden, low_down, low_up, mask)
        ctx.adapter, ctx.linear = adapter, linear
        if phantom:
            return x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)
        output = linear.base(x)
        adapter.add_update(output, hidden, low_up, adapter.scale)
        if adapter.start is not None:
            adapter.add_update(output, F.linear(x, adapter.start[0].to(x.dtype)), adapter.start[1], -adapter.scale)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, low_down, low_up, mask = ctx.saved_tensors
        adapter = ctx.adapter
        flat = grad.reshape(-1, grad.shape[-1])
        hidden_grad = adapter.hidden_gradient(flat, low_up)
        if mask is not None:
            hidden_grad = (hidden_grad.view(hidden.shape) * mask).view(hidden_grad.shape)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_down = (hidden_grad.t() @ x.reshape(-1, x.shape[-1]).to(hidden_grad.dtype)).to(adapter.down.dtype)
        if ctx.needs_input_grad[2]:
            grad_up = adapter.up_gradient(flat, hidden.reshape(-1, hidden.shape[-1]))
        if ctx.needs_input_grad[0]:
            grad_x = ctx.linear.input_gradient(grad)
            flat_x = grad_x.view(-1, grad_x.shape[-1])
            flat_x.addmm_(hidden_grad, low_down)
            if adapter.start is not None:
                start_down, start_up = (tensor.to(grad.dtype) for tensor in adapter.start)
                flat_x.addmm_(adapter.hidden_gradient(flat, start_up), start_down, alpha=-1)
        return grad_x, grad_down, grad_up, None, None, None


def _projected(adapter: LoraAdapter, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(down-projected values, their dropout mask, `down` in x's precision)."""
    low = down.to(x.dtype)
    hidden = F.linear(x, low)
    mask = adapter.dropout.mask(adapter.name, hidden, adapter.draws)
    return (hidden if mask is None else hidden * mask), mask, low


def make(settings: Settings, target: Target, linear: Linear, draws: Draws, seed: int) -> LoraAdapter:
    """The LoRA on ``linear`` that the settings ask for, at its start."""
    dropout = Dropout(settings.dropout, settings.rank_dropout, settings.module_dropout)
    adapter = LoraAdapter(target, settings.scale_of(target.rank, target.alpha), dropout, draws, linear.device)
    adapter.initialise(settings.init, seed, linear)
    return adapter
