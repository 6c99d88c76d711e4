"""What a network adds to a model, independent of any file: factors by BFL module and rows.

Every file is read into a `Change` and written from one (`forms`), so that a conversion is a read and a write. Needs no
torch: what a file says without its values can be read the same way (`stored`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.errors import NetworkFileError
from library.networks import names, parts
from library.networks.kinds import UP, Factors, kind_of
from library.networks.parts import Rows

if TYPE_CHECKING:
    from torch import Tensor

Slot = tuple[str, Rows]
_DIFFUSERS_SPELLINGS = ("peft", "bare", "lycoris", "onetrainer")


@dataclass
class Change:
    """``entries``: (BFL module, rows) -> factors; ``sizes``: (out, in) of those modules; ``biases``: changes of biases;
    ``text``: factors by CLIP-L module."""

    entries: dict[Slot, Factors] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Factors] = field(default_factory=dict)

    def by_module(self) -> dict[str, list[tuple[Rows, Factors]]]:
        """The entries of each module, in row order."""
        grouped: dict[str, list[tuple[Rows, Factors]]] = {}
        for (module, rows), factors in sorted(self.entries.items(), key=lambda item: item[0]):
            grouped.setdefault(module, []).append((rows, factors))
        return grouped


def diffusers_order(module: str, factors: Factors) -> Factors:
    """The factors with the output halves as diffusers keeps them (and back: the exchange is its own inverse)."""
    if module != parts.SWAPPED_HALVES:
        return factors
    if factors.kind != "lora":
        raise NetworkFileError(
            f"{factors.kind} on {module} has no diffusers form: its output halves are exchanged there"
        )
    tensors = {**factors.tensors, UP: halves_exchanged(factors.tensors[UP])}
    return Factors("lora", tensors, factors.alpha)


def halves_exchanged(rows: Tensor) -> Tensor:
    """A tensor with the two halves of its rows exchanged."""
    half = rows.shape[0] // 2
    return rows[[*range(half, rows.shape[0]), *range(half)]]


def read_change(tensors: dict[str, Tensor], source: str) -> tuple[Change, list[str]]:
    """Understand a file's tensors: (what it adds to the model, keys of text encoders that InFlux does not use).

    Raises NetworkFileError naming every key that means nothing to InFlux.
    """
    grouped: dict[names.Place, dict[str, Tensor]] = {}
    unread, unused = [], []
    for key, tensor in tensors.items():
        meaning = names.parse(key)
        if meaning is not None:
            grouped.setdefault(meaning.place, {})[meaning.tensor] = tensor
        else:
            (unused if names.is_other_text_encoder(key) else unread).append(key)
    if unread:
        raise NetworkFileError(
            f"{source}: {len(unread)} of {len(tensors)} keys name no linear of FLUX.1: {', '.join(unread[:5])}"
            f"{' ...' if len(unread) > 5 else ''}. Is it a network for another model?"
        )
    change = Change()
    for place, members in grouped.items():
        _add(change, place, members, source)
    return change, unused


def _add(change: Change, place: names.Place, members: dict[str, Tensor], source: str) -> None:
    members = dict(members)
    biases = {name: members.pop(name) for name in ("diff_b", "lora_B.bias") if name in members}
    alpha = members.pop("alpha", None)
    factors = None if not members else _factors(place, members, alpha, source)
    if biases:
        scale = 1.0 if "diff_b" in biases or factors is None else factors.scale
        _add_bias(change, place, biases.get("diff_b", biases.get("lora_B.bias")), scale, source)
    if factors is None:
        return
    if place.spelling == "text_encoder":
        change.text[place.module] = factors
        return
    if place.spelling in _DIFFUSERS_SPELLINGS:
        factors = diffusers_order(place.module, factors)
    out_features, in_features = factors.shape
    rows = _rows_of(place, out_features, in_features)
    if (place.module, rows) in change.entries:
        raise NetworkFileError(f"{source}: {place.module} is given twice, under two spellings")
    change.entries[(place.module, rows)] = factors
    total = _total_rows(place, rows, in_features)
    previous = change.sizes.get(place.module, (0, 0))
    change.sizes[place.module] = (max(total, previous[0]), in_features or previous[1])


def _factors(place: names.Place, members: dict[str, Tensor], alpha: Tensor | None, source: str) -> Factors:
    kind = kind_of(members)
    if kind is None or {"lora_mid.weight", "hada_t1", "lokr_t2", "set_weight", "reshape_weight"} & members.keys():
        raise NetworkFileError(
            f"{source}: {place.module} holds {', '.join(sorted(members))}, which InFlux cannot apply"
        )
    factors = Factors(kind, members, None if alpha is None else float(alpha))
    try:
        _ = factors.shape
    except (KeyError, ValueError) as error:
        raise NetworkFileError(f"{source}: {place.module} is incomplete: {', '.join(sorted(members))}") from error
    return factors


def _add_bias(change: Change, place: names.Place, bias: Tensor, scale: float, source: str) -> None:
    """Put a change of a bias at its rows of the whole module's."""
    if place.spelling == "text_encoder":
        raise NetworkFileError(f"{source}: it changes the bias of {place.module} of CLIP-L, which InFlux cannot apply")
    length = bias.shape[0]
    rows = _rows_of(place, length, length if place.part is not None and place.part < 3 else length // 4)
    if place.module not in change.biases:
        hidden = rows[1] - rows[0] if place.part is None or place.part < 3 else length // 4
        change.biases[place.module] = bias.new_zeros(_total_rows(place, rows, hidden))
    swapped = place.spelling in _DIFFUSERS_SPELLINGS and place.module == parts.SWAPPED_HALVES
    change.biases[place.module][rows[0] : rows[1]] = (halves_exchanged(bias) if swapped else bias) * scale


def _rows_of(place: names.Place, out_features: int, in_features: int) -> Rows:
    if place.part is None:
        return (0, out_features)
    width = out_features if place.part < 3 else in_features or out_features // 4
    return (place.part * width, place.part * width + out_features)


def _total_rows(place: names.Place, rows: Rows, in_features: int) -> int:
    """Rows of the whole fused module, from one part of it; FLUX's mlp is four times as wide as its blocks."""
    if place.part is None:
        return rows[1]
    num_parts = len(parts.diffusers_names(place.module))
    if num_parts == 4:
        return max(rows[1], 7 * in_features)
    return num_parts * (rows[1] - rows[0]) if num_parts > 1 else rows[1]


def require_fit(source: object, change: Change, sizes: dict[str, tuple[int, int]]) -> None:
    """Raises NetworkFileError if ``change`` does not fit a model whose linears have these (out, in) sizes."""
    for module in (*change.sizes, *change.biases):
        if module not in sizes:
            raise NetworkFileError(f"{source}: the model has no {module}; the network is for a deeper FLUX")
    for (module, rows), factors in change.entries.items():
        out_features, in_features = factors.shape
        if rows[1] > sizes[module][0] or in_features not in (0, sizes[module][1]):
            hint = ""
            if module == "img_in":
                hint = f": it was trained on a model with {in_features} input channels, not on FLUX.1 Fill"
            raise NetworkFileError(
                f"{source}: {module} is {out_features} x {in_features} at rows {rows[0]}..{rows[1]}, but the"
                f" model's is {sizes[module][0]} x {sizes[module][1]}{hint}"
            )
    for module, bias in change.biases.items():
        if bias.shape[0] != sizes[module][0]:
            raise NetworkFileError(
                f"{source}: the bias of {module} has {bias.shape[0]} values, the model's has {sizes[module][0]}"
            )
