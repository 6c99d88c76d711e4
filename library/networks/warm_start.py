"""Starting from a trained file: any trainer's, under any spelling; the change it makes to the model is kept exactly.

Files fold alpha into the factors. The metadata says what alpha was trained with, so it is unfolded again: a continued
run takes the same effective step as the run that made the file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.networks import factors as arithmetic
from library.networks import parts
from library.networks.dense import DenseAdapter
from library.networks.factors import DOWN, UP, Factors
from library.networks.forms import fused
from library.networks.loading import LoadedNetwork, load_network
from library.networks.lora import LoraAdapter
from library.networks.lycoris import DoraAdapter, LycorisAdapter
from library.networks.metadata import trained_alpha
from library.networks.network import Network
from library.networks.parts import Part, Rows
from library.networks.targets import Inherited


@dataclass(frozen=True)
class WarmStart:
    """A file to start from, and what it says about the network's shape."""

    path: Path
    loaded: LoadedNetwork
    inherited: Inherited


def read(table: NetworkTable, linears: dict[str, tuple[int, int]]) -> WarmStart | None:
    """The file that ``network_weights`` names, with the ranks (if dim_from_weights) and alphas it gives."""
    if table.network_weights is None:
        return None
    loaded = load_network(table.network_weights)
    ranks, alphas, covered = {}, {}, set()
    for module, pieces in loaded.change.by_module().items():
        if module not in linears:
            raise ConfigError(f"network_weights: {loaded.path} changes {module}, which the base model does not have")
        rank = max(_pair_rank(loaded, module, pieces, table.network_layout), 1)
        ranks[module] = rank
        covered |= set(_covered(module, pieces, linears[module]))
        if pieces[0][1].kind in ("oft", "full"):
            continue  # neither has a scale to keep
        alpha = trained_alpha(loaded.metadata, module)
        if alpha is None and pieces[0][1].alpha is not None and "influx_trained_alpha" not in loaded.metadata:
            alpha = pieces[0][1].scale * rank
        if alpha is not None:
            alphas[module] = (alpha, rank)
    if not table.dim_from_weights:
        return WarmStart(loaded.path, loaded, Inherited({}, {} if table.changed("network_alpha") else alphas, None))
    return WarmStart(loaded.path, loaded, Inherited(ranks, alphas, frozenset(covered)))


def _pair_rank(loaded: LoadedNetwork, module: str, pieces: list[tuple[Rows, Factors]], layout: str) -> int:
    """The rank one pair of the network has, in the file's own layout or split out of a block-diagonal merge."""
    if pieces[0][1].kind == "oft":
        return pieces[0][1].tensors["oft_blocks"].shape[1]
    if layout == "split" and len(pieces) == 1 and pieces[0][1].kind == "lora":
        members = _members(loaded, module, pieces[0][0])
        changed = [rows for rows in members if bool((pieces[0][1].tensors[UP][rows[0] : rows[1]] != 0).any())]
        return max(arithmetic.row_slice(pieces[0][1], rows, members).rank for rows in changed or members)
    if layout == "fused" and pieces[0][1].kind == "lora":
        return fused(loaded.change, module, pieces).rank
    return max(factors.rank for _, factors in pieces)


def _members(loaded: LoadedNetwork, module: str, rows: Rows) -> list[Rows]:
    """The rows of the module's parts inside ``rows``, counted from its start."""
    members = parts.parts(module, *loaded.change.sizes[module])
    return [
        (part.start - rows[0], part.stop - rows[0]) for part in members if rows[0] <= part.start <= part.stop <= rows[1]
    ]


def _covered(module: str, pieces: list[tuple[Rows, Factors]], size: tuple[int, int]) -> list[Part]:
    """The parts of the module that the file changes; all-zero rows of a fused LoRA are parts it left alone."""
    found = []
    for part in parts.parts(module, *size):
        for (start, stop), factors in pieces:
            if start <= part.start and part.stop <= stop:
                up = factors.tensors.get(UP)
                inside = None if up is None else up[part.start - start : part.stop - start]
                if inside is None or bool((inside != 0).any()) or not bool((up != 0).any()):
                    found.append(part)
    return found


@torch.no_grad()
def load_into(network: Network, start: WarmStart) -> None:
    """Give ``network`` the file's values. Raises ConfigError where it cannot hold them exactly."""
    change = start.loaded.change
    grouped = change.by_module()
    missing = sorted(module for module in grouped if module not in network.by_path)
    if missing:
        raise ConfigError(
            f"network_weights: {start.path} changes {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''},"
            " which this configuration does not train. Set dim_from_weights = true, or train those modules too."
        )
    for module, pieces in grouped.items():
        adapter = network.by_path[module]
        if isinstance(adapter, LoraAdapter):
            _load_lora(adapter, start, pieces)
        elif isinstance(adapter, DenseAdapter):
            _load_dense(adapter, start, pieces)
        else:
            _load_lycoris(adapter, start, pieces)


def _load_lora(adapter: LoraAdapter, start: WarmStart, pieces: list[tuple[Rows, Factors]]) -> None:
    adapter.forget_start()
    for index, group in enumerate(adapter.target.groups):
        factors = _for_rows(start, adapter.name, pieces, group)
        if factors.rank > adapter.rank:
            raise ConfigError(
                f"network_weights: {adapter.name} has rank {factors.rank} in {start.path}, {adapter.rank} here. Set"
                " dim_from_weights = true, choose the network_layout it was trained in, or make it smaller with"
                " python -m tools.resize_lora."
            )
        down, up = adapter.group_weights()[index]
        down[: factors.rank].copy_(factors.tensors[DOWN])
        up.zero_()
        up[:, : factors.rank].copy_(factors.tensors[UP] / adapter.scale)


def _for_rows(start: WarmStart, module: str, pieces: list[tuple[Rows, Factors]], group: tuple[Rows, ...]) -> Factors:
    """One LoRA, scale folded in, for the rows of a group, from a file in either layout."""
    if any(factors.kind not in ("lora", "full") or factors.is_dora for _, factors in pieces):
        kinds = {factors.kind for _, factors in pieces}
        raise ConfigError(f"network_weights: {start.path} holds {', '.join(kinds)} on {module}, not a LoRA")
    exact = [factors for rows, factors in pieces if (rows,) == group]
    if exact and exact[0].kind == "lora":
        return arithmetic.folded(exact[0])
    whole = fused(start.loaded.change, module, pieces)
    if len(group) == 1:
        out_features = start.loaded.change.sizes[module][0]
        return arithmetic.row_slice(whole, group[0], _members(start.loaded, module, (0, out_features)))
    up = torch.cat([whole.tensors[UP][first:last] for first, last in group])
    return arithmetic.lora(whole.tensors[DOWN], up)


def _load_dense(adapter: DenseAdapter, start: WarmStart, pieces: list[tuple[Rows, Factors]]) -> None:
    used = 0
    for first, last in adapter.rows:
        for rows, factors in pieces:
            low, high = max(first, rows[0]), min(last, rows[1])
            if low < high:
                delta = factors.delta().float()
                adapter.change[used + low - first : used + high - first] = delta[low - rows[0] : high - rows[0]]
        used += last - first
    bias = start.loaded.change.biases.get(adapter.name)
    if bias is not None and adapter.bias_change is not None:
        adapter.bias_change.copy_(bias)


def _load_lycoris(adapter: nn.Module, start: WarmStart, pieces: list[tuple[Rows, Factors]]) -> None:
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


def _copy(adapter: LycorisAdapter, module: nn.Module, tensors: dict[str, Tensor], start: WarmStart) -> None:
    own = dict(module.named_parameters())
    if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ConfigError(
            f"network_weights: {adapter.name} is cut differently in {start.path}: use the network_dim and network_args"
            " (factor, decompose_both, full_matrix) it was trained with, or dim_from_weights = true"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
