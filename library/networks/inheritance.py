"""What a file to start from brings along, and whether a plan can hold it exactly: asked before weights are loaded.

Files fold alpha into the factors. The metadata says at what scale they were trained, so a continued run takes the same
effective step as the run that made the file. Needs no torch.
"""

from __future__ import annotations

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.networks import parts
from library.networks.change import Change
from library.networks.kinds import DOWN, UP, Factors, diagonal_blocks
from library.networks.metadata import trained_scale
from library.networks.parts import Part, Rows
from library.networks.shapes import FILE_KINDS, tensors_of
from library.networks.stored import StoredNetwork, values_of
from library.networks.targets import Inherited, Plan, Target

Pieces = list[tuple[Rows, Factors]]
WITHOUT_TEXT = "python -m tools.convert_lora IN OUT --without_text_encoder makes a file without that part"


def inherited_from(table: NetworkTable, network: StoredNetwork, linears: dict[str, tuple[int, int]]) -> Inherited:
    """Scales of the modules unless the configuration sets its own; with dim_from_weights also ranks and targets."""
    ranks, scales, covered = {}, {}, set()
    for module, pieces in network.change.by_module().items():
        ranks[module] = max(_pair_rank(network, module, pieces, table.network_layout), 1)
        covered |= set(_covered(module, pieces, linears[module]))
        _inherit_scale(scales, network.metadata, module, pieces[0][1], ranks[module])
    text = text_inherited(table, network.metadata, network.change)
    ranks, scales = ranks | text.ranks, scales | text.scales
    if not table.dim_from_weights:
        return Inherited({}, {} if table.changed("network_alpha") else scales, None)
    return Inherited(ranks, scales, frozenset(covered) if network.change.entries else None)


def text_inherited(table: NetworkTable, metadata: dict[str, str], change: Change) -> Inherited:
    """The same for CLIP-L's part."""
    scales: dict[str, float] = {}
    for module, factors in change.text.items():
        _inherit_scale(scales, metadata, module, factors, factors.rank)
    ranks = {module: factors.rank for module, factors in change.text.items()} if table.dim_from_weights else {}
    keeps = table.dim_from_weights or not table.changed("network_alpha")
    return Inherited(ranks, scales if keeps else {}, None)


def _inherit_scale(
    scales: dict[str, float], metadata: dict[str, str], module: str, factors: Factors, rank: int
) -> None:
    if factors.kind in ("oft", "full"):
        return  # neither has a scale to keep
    scale = trained_scale(metadata, module, rank)
    ours = any(name.startswith("influx_trained") for name in metadata)
    if scale is None and factors.alpha is not None and not ours:
        scale = factors.scale
    if scale:
        scales[module] = scale


def require_held(
    plan: Plan, network: StoredNetwork, linears: dict[str, tuple[int, int]], *, with_text: bool = True
) -> None:
    """Raises ConfigError if the plan cannot hold everything that the file changes, exactly.

    with_text: whether the plan says what is trained of CLIP-L.
    """
    targets = {target.module: target for target in plan.targets}
    change, path = network.change, network.path
    dense = set() if plan.x_embedder is None else {"img_in"}
    missing = sorted(module for module in change.sizes if module not in targets and module not in dense)
    if missing:
        raise _untrained(path, missing)
    for module, pieces in change.by_module().items():
        if module in dense:
            _require_dense(path, module, pieces)
        elif FILE_KINDS[plan.settings.kind] in ("lora", "full") and not plan.settings.dora:
            _require_rows(path, targets[module], pieces, linears[module])
            _require_low_rank(plan, network, targets[module], pieces)
        else:
            _require_same_cut(plan, network, targets[module], pieces)
    for module in change.biases:
        if module not in dense or not plan.x_embedder_bias:
            raise ConfigError(
                f"network_weights: {path} changes the bias of {module}, and only x_embedder's bias can be trained"
                " (train_x_embedder_bias). Merge the file into the base with base_weights instead."
            )
    if with_text:
        _require_text(plan, network)


def _untrained(path: object, names: list[str]) -> ConfigError:
    return ConfigError(
        f"network_weights: {path} changes {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}, which this"
        " configuration does not train. Set dim_from_weights = true, or train those modules too."
    )


def _require_rows(path: object, target: Target, pieces: Pieces, size: tuple[int, int]) -> None:
    trained = [rows for group in target.groups for rows in group]
    lost = [
        part.diffusers
        for part in _covered(target.module, pieces, size)
        if not any(start <= part.start and part.stop <= stop for start, stop in trained)
    ]
    if lost:
        raise _untrained(path, lost)


def _require_dense(path: object, module: str, pieces: Pieces) -> None:
    for _, factors in pieces:
        if factors.kind in ("glora", "oft") or factors.is_dora:
            raise ConfigError(
                f"network_weights: {path} changes {module} in proportion to its weight ({_kind(factors)}), which"
                " train_x_embedder cannot start from. Make a LoRA of it: python -m tools.convert_lora IN OUT --rank 384"
                " --base CHECKPOINT"
            )


def _require_low_rank(plan: Plan, network: StoredNetwork, target: Target, pieces: Pieces) -> None:
    for _, factors in pieces:
        if factors.kind not in ("lora", "full") or factors.is_dora:
            raise ConfigError(f"network_weights: {network.path} holds {_kind(factors)} on {target.module}, not a LoRA")
    if plan.settings.kind == "full":
        return
    for group in target.groups:
        rank = _needed_rank(network, target.module, pieces, group)
        if rank > target.rank:
            raise too_large(network.path, target.module, rank, target.rank)


def too_large(path: object, module: str, rank: int, here: int) -> ConfigError:
    """The error for a file whose LoRA does not fit into the configured rank."""
    return ConfigError(
        f"network_weights: {module} has rank {rank} in {path}, {here} here. Set dim_from_weights = true, choose the"
        " network_layout it was trained in, or make it smaller with python -m tools.resize_lora."
    )


def _kind(factors: Factors) -> str:
    return "DoRA" if factors.is_dora else factors.kind


def _require_same_cut(plan: Plan, network: StoredNetwork, target: Target, pieces: Pieces) -> None:
    if plan.settings.dora:
        raise ConfigError("network_weights: DoRA is saved as a LoRA, so it cannot start from a file; turn use_dora off")
    by_rows, kind = dict(pieces), FILE_KINDS[plan.settings.kind]
    for rows, shapes in tensors_of(plan.settings, target):
        factors = by_rows.get(rows)
        if factors is None or factors.kind != kind:
            found = ", ".join(f"{other.kind} on rows {at}" for at, other in pieces)
            raise ConfigError(
                f"network_weights: {network.path} holds {found} of {target.module}, not {kind} on rows {rows}:"
                " choose the network_module and network_layout it was trained with"
            )
        if {name: tuple(tensor.shape) for name, tensor in factors.tensors.items()} != shapes:
            raise ConfigError(
                f"network_weights: {target.module} is cut differently in {network.path}: use the network_dim and"
                " network_args (factor, decompose_both, full_matrix) it was trained with, or dim_from_weights = true"
            )


def _require_text(plan: Plan, network: StoredNetwork) -> None:
    if not network.change.text:
        return
    if not plan.text:
        raise ConfigError(
            f"network_weights: {network.path} also trains CLIP-L ({len(network.change.text)} modules), which this"
            f" configuration does not: set train_text_encoder = true. {WITHOUT_TEXT}."
        )
    targets = {target.module: target for target in plan.text}
    for module, factors in network.change.text.items():
        target = targets.get(module)
        if target is None:
            raise ConfigError(
                f"network_weights: {network.path} changes {module} of CLIP-L, and train_text_encoder trains its"
                f" attention (q, k, v, out) alone. {WITHOUT_TEXT}."
            )
        if factors.kind != "lora" or factors.is_dora:
            raise ConfigError(f"network_weights: {network.path} holds {_kind(factors)} on {module}, not a LoRA")
        if factors.shape != (target.out_features, target.in_features):
            raise ConfigError(f"network_weights: {network.path} is for another CLIP-L: {module} is {factors.shape}")
        if factors.rank > target.rank:
            raise ConfigError(
                f"network_weights: {module} of CLIP-L has rank {factors.rank} in {network.path}, {target.rank} here."
                " Set dim_from_weights = true or a larger text_encoder_dim."
            )


def require_base_weights(table: NetworkTable, network: StoredNetwork, clip: dict[str, tuple[int, int]]) -> None:
    """Raises ConfigError if the file changes what this run takes from the cache: CLIP-L, unless it is trained."""
    if not network.change.text:
        return
    if not table.train_text_encoder:
        raise ConfigError(
            f"base_weights: {network.path} also changes CLIP-L ({len(network.change.text)} modules), but the captions'"
            f" embeddings come from the cache. Set train_text_encoder = true to use it. {WITHOUT_TEXT}."
        )
    for module, factors in network.change.text.items():
        if factors.shape != clip.get(module):
            raise ConfigError(f"base_weights: {network.path} changes {module} of CLIP-L, which this base does not have")


def _pair_rank(network: StoredNetwork, module: str, pieces: Pieces, layout: str) -> int:
    """The rank one pair of the network has, in the file's own layout or split out of a block-diagonal merge."""
    first = pieces[0][1]
    if first.kind == "oft":
        return first.tensors["oft_blocks"].shape[1]
    if layout == "split" and len(pieces) == 1 and first.kind == "lora":
        members = members_of(network, module, pieces[0][0])
        if len(members) == 1:
            return first.rank
        up = values_of(first.tensors[UP])
        changed = [rows for rows in members if bool((up[rows[0] : rows[1]] != 0).any())]
        blocks = diagonal_blocks(up, members)
        return max(_width(blocks, rows, first.rank) for rows in changed or members)
    if layout == "fused" and first.kind == "lora":
        return _fused_rank(network, module, pieces)
    return max(factors.rank for _, factors in pieces)


def _needed_rank(network: StoredNetwork, module: str, pieces: Pieces, group: tuple[Rows, ...]) -> int:
    """The rank that `warm_start` will find for one pair's rows."""
    exact = [factors for rows, factors in pieces if (rows,) == group]
    if exact and exact[0].kind == "lora":
        return exact[0].rank
    whole = _fused_rank(network, module, pieces)
    if len(group) > 1 or len(pieces) > 1 or pieces[0][1].kind != "lora":
        return whole
    members = members_of(network, module, (0, network.change.sizes[module][0]))
    return _width(diagonal_blocks(values_of(pieces[0][1].tensors[UP]), members), group[0], whole)


def _width(blocks: dict[Rows, Rows], rows: Rows, otherwise: int) -> int:
    return blocks[rows][1] - blocks[rows][0] if rows in blocks else otherwise


def _fused_rank(network: StoredNetwork, module: str, pieces: Pieces) -> int:
    """Rank of the module's one exact LoRA: the sum of the pieces', down-projections that are shared counted once."""
    import numpy

    downs: list[object] = []
    rank = 0
    for (start, stop), factors in pieces:
        if factors.kind == "full":
            identity = factors.shape[1] <= stop - start
            own = "identity" if identity else (start, stop)
            known = any(isinstance(down, str) and down == own for down in downs)
        else:
            own = values_of(factors.tensors[DOWN])
            known = len(pieces) > 1 and any(
                isinstance(down, numpy.ndarray) and numpy.array_equal(down, own) for down in downs
            )
        if not known:
            downs.append(own)
            rank += min(factors.shape) if factors.kind == "full" else factors.rank
    return rank


def members_of(network: StoredNetwork, module: str, rows: Rows) -> list[Rows]:
    """The rows of the module's parts inside ``rows``, counted from its start."""
    members = parts.parts(module, *network.change.sizes[module])
    return [
        (part.start - rows[0], part.stop - rows[0]) for part in members if rows[0] <= part.start <= part.stop <= rows[1]
    ]


def _covered(module: str, pieces: Pieces, size: tuple[int, int]) -> list[Part]:
    """The parts of the module that the file changes; all-zero rows of a fused LoRA are parts it left alone."""
    found, of_module = [], parts.parts(module, *size)
    if len(of_module) == 1:
        return list(of_module)
    for (start, stop), factors in pieces:
        up = None if UP not in factors.tensors else values_of(factors.tensors[UP])
        anything = up is not None and bool((up != 0).any())
        for part in of_module:
            if start <= part.start and part.stop <= stop:
                inside = None if up is None else up[part.start - start : part.stop - start]
                if inside is None or not anything or bool((inside != 0).any()):
                    found.append(part)
    return found
