"""Which linears are trained, with which rank, alpha and learning rate: presets, suffixes, patterns, block indices.

Selection works on diffusers' linears (the finest cut), so that the reference trainer's list means what it meant there;
the layout then says whether the chosen parts of one fused linear share a down-projection. Needs no torch.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.networks import parts
from library.networks.arguments import Settings, resolve, with_own_keys
from library.networks.names import kohya_stem
from library.networks.parts import Part, Rows

REFERENCE = (
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""The list that the published reference trainer uses by default."""
_ATTENTION = REFERENCE[:8]
X_EMBEDDER = "img_in"

_DIM_GROUPS = {
    "img_attn_dim": "img_attn.",
    "txt_attn_dim": "txt_attn.",
    "img_mlp_dim": "img_mlp.",
    "txt_mlp_dim": "txt_mlp.",
    "img_mod_dim": "img_mod.",
    "txt_mod_dim": "txt_mod.",
    "single_mod_dim": ".modulation.",
    "single_dim": "single_blocks.",
}


@dataclass(frozen=True)
class Target:
    """One BFL linear that gets a network. ``groups``: row ranges that share a down-projection, one entry per pair."""

    module: str
    out_features: int
    in_features: int
    groups: tuple[tuple[Rows, ...], ...]
    rank: int
    alpha: float
    learning_rate: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether one pair covers every row."""
        return self.groups == (((0, self.out_features),),)

    @property
    def trained_rows(self) -> int:
        """Number of rows that change."""
        return sum(stop - start for group in self.groups for start, stop in group)


@dataclass(frozen=True)
class Inherited:
    """What a file to start from says: ranks and scales by module (CLIP-L's too), the parts it changes (None: any)."""

    ranks: dict[str, int]
    scales: dict[str, float]
    parts: frozenset[Part] | None


@dataclass(frozen=True)
class Plan:
    """Everything a configuration trains. x_embedder: its (out, in) if it is trained in full; text: CLIP-L's linears."""

    settings: Settings
    targets: tuple[Target, ...]
    x_embedder: tuple[int, int] | None = None
    x_embedder_bias: bool = False
    text: tuple[Target, ...] = ()


def plan(
    table: NetworkTable, linears: dict[str, tuple[int, int]], inherited: Inherited = Inherited({}, {}, None)
) -> Plan:
    """What ``table`` trains on a transformer whose linears have these (out, in) sizes.

    ``inherited``: what a file to start from adds; with its parts given, they replace the table's selection.

    Raises ConfigError for a pattern that matches nothing (with near names), or a plan that trains nothing.
    """
    settings = resolve(table)
    table = with_own_keys(table)
    everything = [part for module, (out, width) in linears.items() for part in parts.parts(module, out, width)]
    if inherited.parts is None:
        chosen = _chosen(table, settings, everything)
    else:
        chosen = [part for part in everything if part in inherited.parts]
    if table.train_x_embedder:
        chosen = [part for part in chosen if part.module != X_EMBEDDER]
    if table.train_x_embedder_bias and not table.train_x_embedder:
        raise ConfigError("train_x_embedder_bias needs train_x_embedder = true")
    targets = _targets(table, settings, chosen, linears, inherited)
    if not targets and not table.train_x_embedder:
        raise ConfigError("the configuration trains no module at all: see network_targets and the block indices")
    x_embedder = linears[X_EMBEDDER] if table.train_x_embedder else None
    return Plan(settings, targets, x_embedder, table.train_x_embedder_bias)


def _chosen(table: NetworkTable, settings: Settings, everything: list[Part]) -> list[Part]:
    if table.lora_layers:
        chosen = _by_suffix(table.lora_layers, everything)
    else:
        chosen = {part for part in everything if _in_preset(table.network_targets, part)}
    chosen |= {part for part in everything if _has_dim(settings, part)}
    chosen |= _by_pattern("include_patterns", table.include_patterns, everything)
    chosen -= _by_pattern("exclude_patterns", table.exclude_patterns, everything)
    num_double, num_single = _depths(everything)
    doubles = block_indices("train_double_block_indices", table.train_double_block_indices, num_double)
    singles = block_indices("train_single_block_indices", table.train_single_block_indices, num_single)
    if settings.train_blocks == "single":
        doubles = frozenset()
    if settings.train_blocks == "double":
        singles = frozenset()
    return [part for part in everything if part in chosen and _in_blocks(part, doubles, singles)]


def _in_preset(preset: str, part: Part) -> bool:
    if preset == "all-linear":
        return True
    if preset in ("blocks", "attn-mlp"):
        return parts.is_block(part.module) and not parts.is_modulation(part.module)
    return _has_suffix(part.diffusers, _ATTENTION if preset == "attn" else REFERENCE)


def _has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _by_suffix(suffixes: tuple[str, ...], everything: list[Part]) -> set[Part]:
    chosen: set[Part] = set()
    for suffix in suffixes:
        found = {
            part for part in everything if _has_suffix(part.diffusers, [suffix]) or _has_suffix(part.module, [suffix])
        }
        if not found:
            raise ConfigError(f"lora_layers: no linear's name ends in {suffix!r}{_near(suffix, everything)}")
        chosen |= found
    return chosen


def _by_pattern(key: str, patterns: tuple[str, ...], everything: list[Part]) -> set[Part]:
    chosen: set[Part] = set()
    for pattern in patterns:
        expression = _compiled(key, pattern)
        found = {part for part in everything if _matches(expression, part)}
        if not found:
            raise ConfigError(f"{key}: {pattern!r} matches no linear{_near(pattern, everything)}")
        chosen |= found
    return chosen


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from None


def _matches(expression: re.Pattern[str], part: Part) -> bool:
    return any(expression.search(name) for name in (part.module, part.diffusers, kohya_stem(part.module)))


def _near(wanted: str, everything: list[Part]) -> str:
    """Names without block numbers that look like ``wanted``, for an error message."""
    names = {re.sub(r"^\w+_blocks\.\d+\.", "", name) for part in everything for name in (part.module, part.diffusers)}
    bare = re.sub(r"[\\^$]|\.\*|\\d\+|\(\?:|[()]", "", wanted).strip(".")
    tails = {name: name for name in names} | {name.rpartition(".")[2]: name for name in names}
    near = [tails[tail] for tail in difflib.get_close_matches(bare, list(tails), n=5, cutoff=0.5)]
    near = list(dict.fromkeys(near)) or sorted(names)[:8]
    return f". Near names: {', '.join(near)} (--list_modules prints all)"


def _depths(everything: list[Part]) -> tuple[int, int]:
    counts = {"double": 0, "single": 0}
    for part in everything:
        if parts.is_block(part.module):
            kind, index = part.module.split("_blocks.")[0], int(part.module.split(".")[1])
            counts[kind] = max(counts[kind], index + 1)
    return counts["double"], counts["single"]


def _in_blocks(part: Part, doubles: frozenset[int], singles: frozenset[int]) -> bool:
    if not parts.is_block(part.module):
        return True
    return int(part.module.split(".")[1]) in (doubles if part.module.startswith("double") else singles)


def block_indices(key: str, text: str, count: int) -> frozenset[int]:
    """The block numbers that "all", "none" or a list as "0-3,5" means. Raises ConfigError beyond the model's depth."""
    if text == "all":
        return frozenset(range(count))
    if text == "none":
        return frozenset()
    indices: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f'{key} = {text!r}: write "all", "none", or numbers and ranges as "0-3,5"')
        indices |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    beyond = sorted(index for index in indices if index >= count)
    if beyond:
        raise ConfigError(f"{key} = {text!r}: the model has {count} such blocks, 0 to {count - 1}; no {beyond[0]}")
    return frozenset(indices)


def _dim_group(module: str) -> str | None:
    return next((name for name, mark in _DIM_GROUPS.items() if mark in module), None)


def _kohya_dim(settings: Settings, module: str) -> int | None:
    """The rank that kohya's *_dim and in_dims arguments give the module; 0 leaves it out, None says nothing."""
    top = module.split(".")[0]
    if top in settings.in_dims:
        return settings.in_dims[top]
    group = _dim_group(module)
    return None if group is None else settings.dims.get(group)


def _has_dim(settings: Settings, part: Part) -> bool:
    return bool(_kohya_dim(settings, part.module))


def _rules(key: str, rules: tuple[str, ...]) -> list[tuple[re.Pattern[str], float]]:
    parsed = []
    for rule in rules:
        pattern, equals, text = rule.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not equals or not pattern or value < 0:
            raise ConfigError(f'{key}: {rule!r} is not of the form "regex=number"')
        parsed.append((_compiled(key, pattern), value))
    return parsed


def _first_match(rules: list[tuple[re.Pattern[str], float]], members: list[Part]) -> float | None:
    return next((value for expression, value in rules if any(_matches(expression, part) for part in members)), None)


def _check_used(key: str, rules: list[tuple[re.Pattern[str], float]], chosen: list[Part]) -> None:
    for expression, _ in rules:
        if not any(_matches(expression, part) for part in chosen):
            near = _near(expression.pattern, chosen)
            raise ConfigError(f"{key}: {expression.pattern!r} matches no trained linear{near}")


def _targets(
    table: NetworkTable,
    settings: Settings,
    chosen: list[Part],
    linears: dict[str, tuple[int, int]],
    inherited: Inherited,
) -> tuple[Target, ...]:
    dims = _rules("network_reg_dims", table.network_reg_dims)
    alphas = _rules("network_reg_alphas", table.network_reg_alphas)
    rates = _rules("network_reg_lrs", table.network_reg_lrs)
    for key, rules in (("network_reg_dims", dims), ("network_reg_alphas", alphas), ("network_reg_lrs", rates)):
        _check_used(key, rules, chosen)
    by_module: dict[str, list[Part]] = {}
    for part in chosen:
        by_module.setdefault(part.module, []).append(part)
    targets = []
    for module, members in by_module.items():
        rank = inherited.ranks.get(module, _first_match(dims, members))
        rank = _kohya_dim(settings, module) if rank is None else int(rank)
        rank = settings.rank if rank is None else rank
        if rank == 0:
            continue
        alpha = _first_match(alphas, members)
        if alpha is None and module in inherited.scales:
            alpha = settings.alpha_of(rank, inherited.scales[module])
        alpha = (settings.alpha if rank == settings.rank else None) if alpha is None else alpha
        alpha = _alpha_for(settings, rank) if alpha is None else alpha
        out_features, in_features = linears[module]
        target = Target(
            module, out_features, in_features, _groups(settings.layout, members), rank, float(alpha),
            _first_match(rates, members),
        )  # fmt: skip
        _check_whole(settings, target)
        targets.append(target)
    return tuple(targets)


def _alpha_for(settings: Settings, rank: int) -> float:
    """Alpha of a module with a rank of its own: the same alpha / rank as the others."""
    return rank if settings.alpha is None else settings.alpha * rank / settings.rank


def _groups(layout: str, members: list[Part]) -> tuple[tuple[Rows, ...], ...]:
    if layout == "split":
        return tuple((part.rows,) for part in members)
    merged: list[Rows] = []
    for part in members:
        if merged and merged[-1][1] == part.start:
            merged[-1] = (merged[-1][0], part.stop)
        else:
            merged.append(part.rows)
    return (tuple(merged),)


def _check_whole(settings: Settings, target: Target) -> None:
    if settings.kind in ("lora", "locon") and not settings.dora:
        return
    if settings.layout == "fused" and not target.is_whole:
        raise ConfigError(
            f"{settings.kind} in the fused layout changes whole modules, but only some rows of {target.module} are"
            ' chosen: use network_targets = "blocks" or "attn-mlp", or network_layout = "split"'
        )
