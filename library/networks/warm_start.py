"""Starting from a trained file: any trainer's, under any spelling; the change it makes to the model is kept exactly."""

import torch
from torch import Tensor, nn

from library.errors import ConfigError
from library.networks import factors as arithmetic
from library.networks.dense import DenseAdapter
from library.networks.factors import DOWN, UP, Factors
from library.networks.forms import fused
from library.networks.inheritance import members_of, too_large
from library.networks.loading import LoadedNetwork
from library.networks.lora import LoraAdapter
from library.networks.lycoris import DoraAdapter, LycorisAdapter
from library.networks.network import Network
from library.networks.parts import Rows


@torch.no_grad()
def load_into(network: Network, start: LoadedNetwork) -> None:
    """Give ``network`` the file's values. Raises ConfigError where it cannot hold them exactly.

    What can be told from the file alone, `inheritance.require_held` has refused before.
    """
    for module, pieces in start.change.by_module().items():
        adapter = network.by_path[module]
        if isinstance(adapter, LoraAdapter):
            _load_lora(adapter, start, pieces)
        elif isinstance(adapter, DenseAdapter):
            _load_dense(adapter, start, pieces)
        else:
            _load_lycoris(adapter, start, pieces)


@torch.no_grad()
def load_text_into(network: Network, start: LoadedNetwork) -> None:
    """Give CLIP-L's network the file's part for it."""
    for module, factors in start.change.text.items():
        adapter = network.by_path[module]
        assert isinstance(adapter, LoraAdapter)
        _load_lora(adapter, start, [(adapter.target.groups[0][0], factors)])


def _load_lora(adapter: LoraAdapter, start: LoadedNetwork, pieces: list[tuple[Rows, Factors]]) -> None:
    adapter.forget_start()
    for index, group in enumerate(adapter.target.groups):
        factors = _for_rows(start, adapter.name, pieces, group)
        if factors.rank > adapter.rank:
            raise too_large(start.path, adapter.name, factors.rank, adapter.rank)
        down, up = adapter.group_weights()[index]
        down[: factors.rank].copy_(factors.tensors[DOWN])
        up.zero_()
        up[:, : factors.rank].copy_(factors.tensors[UP] / adapter.scale)


def _for_rows(
    start: LoadedNetwork, module: str, pieces: list[tuple[Rows, Factors]], group: tuple[Rows, ...]
) -> Factors:
    """One LoRA, scale folded in, for the rows of a group, from a file in either layout."""
    if any(factors.kind not in ("lora", "full") or factors.is_dora for _, factors in pieces):
        kinds = {factors.kind for _, factors in pieces}
        raise ConfigError(f"network_weights: {start.path} holds {', '.join(kinds)} on {module}, not a LoRA")
    exact = [factors for rows, factors in pieces if (rows,) == group]
    if exact and exact[0].kind == "lora":
        return arithmetic.folded(exact[0])
    whole = fused(start.change, module, pieces)
    if len(group) == 1:
        out_features = start.change.sizes[module][0]
        return arithmetic.row_slice(whole, group[0], members_of(start, module, (0, out_features)))
    up = torch.cat([whole.tensors[UP][first:last] for first, last in group])
    return arithmetic.lora(whole.tensors[DOWN], up)


def _load_dense(adapter: DenseAdapter, start: LoadedNetwork, pieces: list[tuple[Rows, Factors]]) -> None:
    used = 0
    for first, last in adapter.rows:
        for rows, factors in pieces:
            low, high = max(first, rows[0]), min(last, rows[1])
            if low < high:
                delta = factors.delta().float()
                adapter.change[used + low - first : used + high - first] = delta[low - rows[0] : high - rows[0]]
        used += last - first
    bias = start.change.biases.get(adapter.name)
    if bias is not None and adapter.bias_change is not None:
        adapter.bias_change.copy_(bias)


def _load_lycoris(adapter: nn.Module, start: LoadedNetwork, pieces: list[tuple[Rows, Factors]]) -> None:
    if isinstance(adapter, DoraAdapter):
        raise ConfigError("network_weights: DoRA is saved as a LoRA, so it cannot start from a file; turn use_dora off")
    assert isinstance(adapter, LycorisAdapter)
    by_rows = dict(pieces)
    for rows, module in zip(adapter.rows, adapter.modules_by_rows):
        factors = by_rows.get(rows)
        if factors is None or factors.kind != adapter.kind:
            found = ", ".join(f"{kind.kind} on rows {at}" for at, kind in pieces)
            raise ConfigError(
                f"network_weights: {start.path} holds {found} of {adapter.name}, not {adapter.kind} on rows {rows}:"
                " choose the network_module and network_layout it was trained with"
            )
        plain = arithmetic.folded(factors)
        tensors = plain.tensors
        if adapter.kind != "oft":
            tensors = arithmetic.scaled(adapter.kind, plain.tensors, 1.0 / float(module.scale)).tensors
        _copy(adapter, module, tensors, start)


def _copy(adapter: LycorisAdapter, module: nn.Module, tensors: dict[str, Tensor], start: LoadedNetwork) -> None:
    own = dict(module.named_parameters())
    if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ConfigError(
            f"network_weights: {adapter.name} is cut differently in {start.path}: use the network_dim and network_args"
            " (factor, decompose_both, full_matrix) it was trained with, or dim_from_weights = true"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
