"""The tensors that a network's adapters train, by shape alone: what is counted before anything is built.

`--list_modules`, `--dry_run` and the memory budget count here; the contract tests compare it with the adapters that are
built. Needs no torch.
"""

from __future__ import annotations

from math import prod

from library.networks.arguments import Settings
from library.networks.kinds import DOWN, UP
from library.networks.parts import Rows
from library.networks.targets import Plan, Target

Shapes = dict[str, tuple[int, ...]]
FILE_KINDS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "glora": "glora", "diag-oft": "oft",
    "full": "full",
}  # fmt: skip
"""The algorithm as files name it, by kind of network."""


def tensors_of(settings: Settings, target: Target) -> list[tuple[Rows, Shapes]]:
    """The tensors an adapter trains, by the rows they change; LoRA's down-projection stands with its first rows."""
    if FILE_KINDS[settings.kind] == "lora" and not settings.dora:
        return [_lora(target, group) for group in target.groups]
    rows_of_each = [group[0] for group in target.groups]
    if settings.kind == "full":
        rows_of_each = sorted(rows for group in target.groups for rows in group)
    found = []
    for start, stop in rows_of_each:
        shapes = _SHAPES[settings.kind](settings, target.rank, stop - start, target.in_features)
        if settings.dora:
            on_output = bool(settings.algorithm.get("wd_on_output", True))
            shapes["dora_scale"] = (target.out_features, 1) if on_output else (1, target.in_features)
        found.append(((start, stop), shapes))
    return found


def trained_of(settings: Settings, target: Target) -> int:
    """Number of values that an adapter trains."""
    return sum(prod(shape) for _, shapes in tensors_of(settings, target) for shape in shapes.values())


def trained(plan: Plan) -> int:
    """Number of values that the whole network trains: transformer, x_embedder and CLIP-L."""
    count = sum(trained_of(plan.settings, target) for target in plan.targets)
    count += sum(target.rank * (target.in_features + target.out_features) for target in plan.text)
    if plan.x_embedder is not None:
        out_features, in_features = plan.x_embedder
        count += out_features * (in_features + plan.x_embedder_bias)
    return count


def _lora(target: Target, group: tuple[Rows, ...]) -> tuple[Rows, Shapes]:
    height = sum(stop - start for start, stop in group)
    return group[0], {DOWN: (target.rank, target.in_features), UP: (height, target.rank)}


def low_rank(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    """A down- and an up-projection."""
    return {DOWN: (rank, width), UP: (out, rank)}


def _loha(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    pair = {"a": (out, rank), "b": (rank, width)}
    return {f"hada_w{number}_{side}": shape for number in (1, 2) for side, shape in pair.items()}


def _lokr(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    """lycoris-lora's own cut of both sides (lycoris.modules.lokr)."""
    given = settings.algorithm
    factor, whole = int(given.get("factor", -1)), bool(given.get("full_matrix"))
    (in_small, in_large), (out_small, out_large) = factorized(width, factor), factorized(out, factor)
    if given.get("unbalanced_factorization"):
        out_small, out_large = out_large, out_small
    shapes: Shapes = {"lokr_w1": (out_small, in_small)}
    if given.get("decompose_both") and rank < max(out_small, in_small) / 2 and not whole:
        shapes = {"lokr_w1_a": (out_small, rank), "lokr_w1_b": (rank, in_small)}
    if rank < max(out_large, in_large) / 2 and not whole:
        return shapes | {"lokr_w2_a": (out_large, rank), "lokr_w2_b": (rank, in_large)}
    return shapes | {"lokr_w2": (out_large, in_large)}


def _glora(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    return {
        "a1.weight": (width, rank), "a2.weight": (rank, width), "b1.weight": (out, rank), "b2.weight": (rank, width)
    }  # fmt: skip


def _oft(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    size, number = factorized(out, rank)
    return {"oft_blocks": (number, size, size)}


def _full(settings: Settings, rank: int, out: int, width: int) -> Shapes:
    return {"diff": (out, width)}


_SHAPES = {
    "lora": low_rank, "locon": low_rank, "loha": _loha, "lokr": _lokr, "glora": _glora, "diag-oft": _oft,
    "full": _full,
}  # fmt: skip


def factorized(dimension: int, factor: int) -> tuple[int, int]:
    """Two factors of ``dimension``, the smaller first, near ``factor``: `lycoris.functional.factorization`'s choice."""
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor < 0 else factor
    small, large = 1, dimension
    while small < large:
        larger = next(number for number in range(small + 1, dimension + 1) if dimension % number == 0)
        if larger + dimension // larger > small + large or larger > limit:
            break
        small, large = larger, dimension // larger
    return min(small, large), max(small, large)
