"""The files that a network will be saved in, and their sizes, before anything is trained. Needs no torch.

The contract tests compare these sizes with the files that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from library.networks import parts
from library.networks.arguments import Settings
from library.networks.kinds import DOWN, UP
from library.networks.outline import Format, Spelling, files_of
from library.networks.parts import Rows
from library.networks.shapes import FILE_KINDS, Shapes, low_rank, tensors_of
from library.networks.targets import Plan, Target

_ALPHA_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the `Change` to be saved. ``pair``: pieces of a module with one number share a down-projection."""

    rows: Rows
    size: tuple[int, int]
    kind: str
    shapes: Shapes
    pair: int = 0

    @property
    def rank(self) -> int:
        """Of the LoRA that it becomes; full weights become the exact one, an identity on their smaller side."""
        return self.shapes[DOWN][0] if self.kind == "lora" else min(self.shapes["diff"])

    @property
    def values(self) -> int:
        """Number of values of its own tensors."""
        return sum(prod(shape) for shape in self.shapes.values())


def file_sizes(plan: Plan, format: Format, value_bytes: int) -> list[tuple[Spelling, int]]:
    """The files of the network with their bytes, headers apart. Raises NetworkFileError as `files_of` does."""
    pieces = _pieces(plan)
    kinds = {(module, piece.rows): piece.kind for module, own in pieces.items() for piece in own}
    sizes = {module: own[0].size for module, own in pieces.items()}
    found = []
    for spelling in files_of(kinds, sizes, ["lora"] if plan.text else [], format):
        counts = [count for module, own in pieces.items() for count in _COUNTED[spelling](module, own)]
        counts += [target.rank * (target.in_features + target.out_features) for target in plan.text]
        bias = plan.x_embedder[0] if plan.x_embedder is not None and plan.x_embedder_bias else 0
        found.append((spelling, (sum(counts) + bias) * value_bytes + len(counts) * _ALPHA_BYTES))
    return found


def file_rank(plan: Plan) -> int | None:
    """The commonest rank in the file, x_embedder apart; None where the algorithm has none."""
    pieces = _pieces(plan)
    ranks = [
        piece.rank if piece.kind == "lora" else target.rank
        for target in plan.targets
        for piece in pieces[target.module]
        if piece.kind not in ("oft", "full")
    ]
    return max(set(ranks), key=lambda rank: (ranks.count(rank), rank), default=None)


def _pieces(plan: Plan) -> dict[str, list[Piece]]:
    """Everything the network adds to the transformer, by module."""
    found = {target.module: _pieces_of(plan.settings, target) for target in plan.targets}
    if plan.x_embedder is not None:
        out_features, _ = plan.x_embedder
        found["img_in"] = [Piece((0, out_features), plan.x_embedder, "full", {"diff": plan.x_embedder})]
    return found


def _pieces_of(settings: Settings, target: Target) -> list[Piece]:
    size, found = (target.out_features, target.in_features), []
    for number, (rows, shapes) in enumerate(tensors_of(settings, target)):
        kind, saved = _saved(settings, target, rows, shapes)
        shared = FILE_KINDS[settings.kind] == "lora" and not settings.dora
        for start, stop in target.groups[number] if shared else (rows,):
            own = low_rank(settings, saved[DOWN][0], stop - start, target.in_features) if kind == "lora" else saved
            found.append(Piece((start, stop), size, kind, own, number))
    return found


def _saved(settings: Settings, target: Target, rows: Rows, shapes: Shapes) -> tuple[str, Shapes]:
    """(algorithm, tensors) as `Network.export` hands them on: full weights and DoRA as a LoRA of their export_rank."""
    kind, width, height = FILE_KINDS[settings.kind], target.in_features, rows[1] - rows[0]
    if settings.dora or (kind == "full" and settings.export_rank is not None):
        rank = min(settings.export_rank or 2 * target.rank, height, width)
        return "lora", low_rank(settings, rank, height, width)
    if kind == "lora" and settings.init == "pissa":  # the start is taken off again, as a second LoRA of its rank
        return "lora", low_rank(settings, 2 * target.rank, shapes[UP][0], width)
    return kind, shapes


def _kohya(module: str, pieces: Sequence[Piece]) -> list[int]:
    """One set of tensors for the fused module, down-projections that pieces share counted once."""
    if pieces[0].kind not in ("lora", "full"):
        return [piece.values for piece in pieces]
    downs = {}
    for piece in pieces:
        start, stop = piece.rows
        identity = piece.kind == "full" and piece.size[1] <= stop - start
        downs["identity" if identity else piece.pair] = piece.rank
    return [sum(downs.values()) * sum(pieces[0].size)]


def _peft(module: str, pieces: Sequence[Piece]) -> list[int]:
    """A LoRA for each of diffusers' linears."""
    return [
        piece.rank * (piece.size[1] + part.stop - part.start)
        for piece in pieces
        for part in parts.parts(module, *piece.size)
        if piece.rows[0] <= part.start and part.stop <= piece.rows[1]
    ]


def _lycoris(module: str, pieces: Sequence[Piece]) -> list[int]:
    """The tensors as they are; full weights as an exact LoRA."""
    return [
        piece.rank * (piece.size[1] + piece.rows[1] - piece.rows[0]) if piece.kind == "full" else piece.values
        for piece in pieces
    ]


_COUNTED = {"kohya": _kohya, "diffusers": _peft, "lycoris": _lycoris}
