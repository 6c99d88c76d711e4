"""Reading network files and applying them to a model: one or several, each with a strength, or merged into the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import NetworkFileError
from library.memory.linear import Adapter, Linear
from library.models.flux import FluxTransformer
from library.networks import factors as arithmetic
from library.networks.change import Change, require_fit
from library.networks.factors import DOWN, UP, Factors
from library.networks.metadata import Guide, guide
from library.networks.parts import Rows, is_modulation
from library.networks.stored import network_header, understood


@dataclass(frozen=True)
class LoadedNetwork:
    """A network's file, understood. ``unused``: keys of text encoders that InFlux does not apply."""

    path: Path
    change: Change
    metadata: dict[str, str]
    unused: tuple[str, ...] = ()

    @property
    def guide(self) -> Guide:
        """What the file tells inference."""
        return guide(self.metadata)

    def apply(self, transformer: FluxTransformer, strength: float = 1.0) -> "Applied":
        """Put the network on ``transformer``; more files may follow. Undo with `Applied.remove`."""
        return apply_networks(transformer, [(self, strength)])


def load_network(path: Path | str) -> LoadedNetwork:
    """Read the network in ``path`` under any spelling. Raises NetworkFileError if any of it cannot be understood."""
    from safetensors.torch import load

    path = Path(path)
    header = network_header(path)
    change, unused = understood(path, load(path.read_bytes()))
    for (module, _), factors in change.entries.items():
        _require_finite(path, module, factors)
    return LoadedNetwork(path, change, header.metadata, tuple(unused))


def _require_finite(path: Path, module: str, factors: Factors) -> None:
    for name, tensor in factors.tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise NetworkFileError(f"{path}: {module}.{name} holds NaN or infinity; the training that made it failed")


class AppliedAdapter(Adapter):
    """Changes from one or more files on one linear, for inference: each a (rows, factors, strength)."""

    def __init__(self, linear: Linear):
        super().__init__()
        self._linear = (linear,)
        self.pieces: list[tuple[Rows, Factors, float]] = []
        self.biases: list[tuple[Tensor, float]] = []

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        output = base_output.clone()
        for (start, stop), factors, strength in self.pieces:
            output[..., start:stop] += self._update(factors, x, (start, stop)) * strength
        for bias, strength in self.biases:
            output += bias.to(output) * strength
        return output

    def _update(self, factors: Factors, x: Tensor, rows: Rows) -> Tensor:
        if factors.kind == "lora" and not factors.is_dora:
            hidden = F.linear(x, factors.tensors[DOWN].to(x))
            return F.linear(hidden, factors.tensors[UP].to(x)) * factors.scale
        return F.linear(x, change_of(factors, self._linear[0], rows).to(x))


def change_of(factors: Factors, linear: Linear, rows: Rows) -> Tensor:
    """The change of the linear's rows in fp32, on its device; reads the base weight only where that is needed."""
    moved = Factors(
        factors.kind, {name: tensor.to(linear.device, torch.float32) for name, tensor in factors.tensors.items()},
        factors.alpha,
    )  # fmt: skip
    needs_base = factors.is_dora or factors.kind in ("glora", "oft")
    base = linear.dequantized(torch.float32)[rows[0] : rows[1]] if needs_base else None
    return moved.delta(base)


def home_of(transformer: FluxTransformer, module: str, linear: Linear) -> torch.device:
    """Where a linear computes, which is where its adapter lives: a streamed weight is stored elsewhere meanwhile."""
    return linear.device if is_modulation(module) else transformer.device


class Applied:
    """Networks on a model; `remove` takes exactly these off again."""

    def __init__(self, linears: dict[str, Linear], adapters: dict[str, AppliedAdapter]):
        self._linears = linears
        self._adapters = adapters

    def remove(self) -> None:
        """The model is then as it was before."""
        for module, adapter in self._adapters.items():
            if self._linears[module].adapter is adapter:
                self._linears[module].adapter = None


def apply_networks(transformer: FluxTransformer, networks: Sequence[tuple[LoadedNetwork, float]]) -> Applied:
    """Put several networks on ``transformer`` at once, each with its strength.

    Raises NetworkFileError if one does not fit the model. A network that is being trained stays where it is.
    """
    linears = transformer.linears()
    adapters: dict[str, AppliedAdapter] = {}
    for network, strength in networks:
        _check_fits(network, linears)
        for (module, rows), factors in network.change.entries.items():
            linear = linears[module]
            adapter = adapters.setdefault(module, AppliedAdapter(linear))
            home = home_of(transformer, module, linear)
            tensors = {name: tensor.to(home) for name, tensor in factors.tensors.items()}
            adapter.pieces.append((rows, Factors(factors.kind, tensors, factors.alpha), strength))
        for module, bias in network.change.biases.items():
            adapter = adapters.setdefault(module, AppliedAdapter(linears[module]))
            adapter.biases.append((bias.to(home_of(transformer, module, linears[module])), strength))
    for module, adapter in adapters.items():
        assert linears[module].adapter is None, f"{module} already carries a network"
        linears[module].adapter = adapter
    return Applied(linears, adapters)


def _check_fits(network: LoadedNetwork, linears: dict[str, Linear]) -> None:
    sizes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    require_fit(network.path, network.change, sizes)


@torch.no_grad()
def merge_networks(model: nn.Module, networks: Sequence[tuple[LoadedNetwork, float]]) -> int:
    """Merge networks into the base weights for good, requantising quantised ones; returns how many modules changed."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    merged: set[str] = set()
    for network, strength in networks:
        _check_fits(network, linears)
        for module, pieces in network.change.by_module().items():
            linear = linears[module]
            delta = torch.zeros(linear.out_features, linear.in_features, device=linear.device)
            for rows, factors in pieces:
                delta[rows[0] : rows[1]] += change_of(factors, linear, rows)
            linear.add_to_weight(delta * strength)
            merged.add(module)
        for module, bias in network.change.biases.items():
            linears[module].bias += bias.to(linears[module].bias) * strength
    return len(merged)


def lora_of(factors: Factors, linear: Linear, rows: Rows, rank: int) -> tuple[Factors, float]:
    """A LoRA of at most ``rank`` for any factors on ``linear``, and its relative error."""
    if factors.kind == "lora" and not factors.is_dora:
        return arithmetic.as_lora(factors, rank)
    return arithmetic.svd_lora(change_of(factors, linear, rows), rank)
