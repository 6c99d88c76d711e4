"""One weight's change as a file holds it: the algorithm, its tensors, alpha, and what their shapes alone tell.

Needs no torch: `--dry_run` looks at files to start from through it. The arithmetic is in `factors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DOWN, UP = "lora_down.weight", "lora_up.weight"
_MARKS = {
    "lora": UP,
    "loha": "hada_w1_a",
    "lokr": ("lokr_w1", "lokr_w1_a"),
    "glora": "a1.weight",
    "oft": "oft_blocks",
    "full": "diff",
}


@dataclass(frozen=True)
class Factors:
    """One weight's change: ``kind`` (lora, loha, lokr, glora, oft, full), its tensors, and alpha (None: not given)."""

    kind: str
    tensors: dict[str, Tensor]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """The inner size that alpha is divided by; 1 where the algorithm has none."""
        tensors = self.tensors
        if self.kind == "lora":
            return tensors[DOWN].shape[0]
        if self.kind == "loha":
            return tensors["hada_w1_b"].shape[0]
        if self.kind == "glora":
            return tensors["b2.weight"].shape[0]
        if self.kind == "lokr":
            inner = tensors.get("lokr_w1_b", tensors.get("lokr_w2_b"))
            return 1 if inner is None else inner.shape[0]
        return 1

    @property
    def scale(self) -> float:
        """alpha / rank: what the product of the factors is multiplied by."""
        if self.alpha is None or self.kind in ("oft", "full"):
            return 1.0
        if self.kind == "lokr" and "lokr_w1" in self.tensors and "lokr_w2" in self.tensors:
            return 1.0  # every loader ignores alpha when both Kronecker factors are whole
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is changed."""
        tensors = self.tensors
        if self.kind == "lora":
            return tensors[UP].shape[0], tensors[DOWN].shape[1]
        if self.kind == "loha":
            return tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[1]
        if self.kind == "glora":
            return tensors["b1.weight"].shape[0], tensors["b2.weight"].shape[1]
        if self.kind == "lokr":
            first, second = _kronecker_shapes(tensors)
            return first[0] * second[0], first[1] * second[1]
        if self.kind == "full":
            return tuple(tensors["diff"].shape)
        blocks = tensors["oft_blocks"].shape
        return blocks[0] * blocks[1], 0

    @property
    def is_dora(self) -> bool:
        """Whether a DoRA magnitude rides along: programs disagree on what it does."""
        return "dora_scale" in self.tensors

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype, alpha apart."""
        return Factors(self.kind, {name: tensor.to(dtype) for name, tensor in self.tensors.items()}, self.alpha)

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The change of the weight, (out, in), in the factors' own precision.

        ``base`` is the weight that is changed; glora and oft need it.
        """
        from library.networks.factors import delta

        return delta(self, base)


def kind_of(tensors: dict[str, Tensor]) -> str | None:
    """The algorithm that tensors of these names belong to; None if they are of none."""
    for kind, mark in _MARKS.items():
        marks = mark if isinstance(mark, tuple) else (mark,)
        if any(name in tensors for name in marks):
            return kind
    return None


def _kronecker_shapes(tensors: dict[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    shapes = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            shapes.append(tuple(tensors[name].shape))
        else:
            shapes.append((tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[1]))
    return shapes[0], shapes[1]


def diagonal_blocks(up: Tensor, members: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """The columns that each part alone uses, if `up` is block-diagonal over the parts it changes; else nothing."""
    used = [rows for rows in members if bool((up[rows[0] : rows[1]] != 0).any())]
    if len(used) < 2 or up.shape[1] % len(used):
        return {}
    width = up.shape[1] // len(used)
    blocks = {rows: (index * width, (index + 1) * width) for index, rows in enumerate(used)}
    for (start, stop), (first, last) in blocks.items():
        part = up[start:stop]
        if bool((part[:, :first] != 0).any()) or bool((part[:, last:] != 0).any()):
            return {}
    return blocks
