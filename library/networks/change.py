"""What a network adds to a model, independent of any file: factors by BFL module and rows; its kohya and PEFT forms.

Every file is read into a `Change` and written from one, so that a conversion is a read and a write.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.errors import NetworkFileError
from library.networks import factors as arithmetic
from library.networks import names, parts
from library.networks.factors import DOWN, UP, Factors
from library.networks.parts import Rows

Slot = tuple[str, Rows]


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

    @property
    def kinds(self) -> set[str]:
        """The algorithms that occur."""
        return {factors.kind for factors in (*self.entries.values(), *self.text.values())}

    @property
    def leaves_blocks(self) -> bool:
        """Whether a module outside the transformer blocks changes: diffusers drops those from a kohya file."""
        return any(not parts.is_block(module) for module, _ in self.entries)


def fused(change: Change, module: str, pieces: list[tuple[Rows, Factors]]) -> Factors:
    """One factorisation of the whole fused module. Only LoRAs (and plain changes) can be joined exactly."""
    out_features = change.sizes[module][0]
    if len(pieces) == 1 and pieces[0][0] == (0, out_features):
        factors = pieces[0][1]
        return arithmetic.exact_lora(factors.tensors["diff"]) if factors.kind == "full" else arithmetic.folded(factors)
    joined = []
    for rows, factors in pieces:
        if factors.kind not in ("lora", "full"):
            raise NetworkFileError(
                f"{factors.kind} on parts of {module} has no exact kohya form: save with lycoris names, or convert to"
                " LoRA with a rank"
            )
        joined.append((rows, arithmetic.as_lora(factors)[0]))
    return arithmetic.block_diagonal(joined, out_features)


def kohya_tensors(change: Change, dtype: torch.dtype) -> dict[str, Tensor]:
    """kohya's keys: BFL's fused modules. ComfyUI, Forge and sd-scripts read all; diffusers all inside the blocks."""
    tensors: dict[str, Tensor] = {}
    for module, pieces in change.by_module().items():
        _put(tensors, names.kohya_stem(module), fused(change, module, pieces), dtype, kohya=True)
    for module, bias in change.biases.items():
        tensors[f"{names.kohya_stem(module)}.diff_b"] = bias.to(dtype)
    for module, factors in change.text.items():
        _put(tensors, names.kohya_text_stem(module), arithmetic.folded(factors), dtype, kohya=True)
    return tensors


def peft_tensors(change: Change, dtype: torch.dtype) -> dict[str, Tensor]:
    """PEFT's keys on diffusers' separate linears, with alpha = rank. diffusers, ComfyUI and Forge read all."""
    tensors: dict[str, Tensor] = {}
    for (module, rows), factors in change.entries.items():
        if factors.kind not in ("lora", "full"):
            raise NetworkFileError(
                f"diffusers cannot load {factors.kind} ({module}): save as kohya, or convert to LoRA with a rank"
            )
        out_features, in_features = change.sizes[module]
        members = parts.parts(module, out_features, in_features)
        low_rank = arithmetic.as_lora(factors)[0]
        for part in members:
            if part.start >= rows[0] and part.stop <= rows[1]:
                inside = [(m.start - rows[0], m.stop - rows[0]) for m in members if m.stop <= rows[1]]
                own = (part.start - rows[0], part.stop - rows[0])
                piece = low_rank if part.rows == rows else arithmetic.row_slice(low_rank, own, inside)
                _put(tensors, names.peft_stem(part.diffusers), _diffusers_order(module, piece), dtype, kohya=False)
    for module, bias in change.biases.items():
        tensors[f"{names.peft_stem(parts.diffusers_names(module)[0])}.diff_b"] = bias.to(dtype)
    for module, factors in change.text.items():
        _put(tensors, names.peft_text_stem(module), arithmetic.folded(factors), dtype, kohya=False)
    return tensors


def lycoris_tensors(change: Change, dtype: torch.dtype) -> dict[str, Tensor]:
    """LyCORIS's keys on diffusers' separate linears: how a split LoKr or LoHa travels. ComfyUI and Forge read them."""
    tensors: dict[str, Tensor] = {}
    for (module, rows), factors in change.entries.items():
        out_features, in_features = change.sizes[module]
        for part in parts.parts(module, out_features, in_features):
            if part.rows == rows:
                plain = arithmetic.as_lora(factors)[0] if factors.kind == "full" else arithmetic.folded(factors)
                _put(tensors, names.lycoris_stem(part.diffusers), _diffusers_order(module, plain), dtype, kohya=True)
                break
        else:
            raise NetworkFileError(f"{factors.kind} on rows {rows} of {module} is no linear of diffusers")
    return tensors


def _diffusers_order(module: str, factors: Factors) -> Factors:
    """The factors with the output halves as diffusers keeps them (and back: the exchange is its own inverse)."""
    if module != parts.SWAPPED_HALVES:
        return factors
    if factors.kind != "lora":
        raise NetworkFileError(
            f"{factors.kind} on {module} has no diffusers form: its output halves are exchanged there"
        )
    return arithmetic.lora(factors.tensors[DOWN], torch.cat(factors.tensors[UP].chunk(2)[::-1]), factors.alpha)


def _put(tensors: dict[str, Tensor], stem: str, factors: Factors, dtype: torch.dtype, *, kohya: bool) -> None:
    """Write one module's tensors. alpha is a 0-dim float: diffusers refuses integers, sd-scripts a missing one."""
    rename = {} if kohya else {DOWN: "lora_A.weight", UP: "lora_B.weight"}
    for name, tensor in factors.tensors.items():
        tensors[f"{stem}.{rename.get(name, name)}"] = tensor.to(dtype).contiguous()
    alpha = (factors.alpha or 0.0) if factors.kind == "oft" else float(factors.rank)
    tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)


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
    bias = members.pop("diff_b", None)
    if bias is not None and place.part is None:
        change.biases[place.module] = bias
    alpha = members.pop("alpha", None)
    if not members:
        return
    kind = arithmetic.kind_of(members)
    if kind is None or {"lora_mid.weight", "hada_t1", "lokr_t2", "set_weight", "reshape_weight"} & members.keys():
        raise NetworkFileError(
            f"{source}: {place.module} holds {', '.join(sorted(members))}, which InFlux cannot apply"
        )
    factors = Factors(kind, members, None if alpha is None else float(alpha))
    try:
        out_features, in_features = factors.shape
    except (KeyError, ValueError) as error:
        raise NetworkFileError(f"{source}: {place.module} is incomplete: {', '.join(sorted(members))}") from error
    if place.spelling == "text_encoder":
        change.text[place.module] = factors
        return
    if place.spelling in ("peft", "bare", "lycoris", "onetrainer"):
        factors = _diffusers_order(place.module, factors)
    rows = _rows_of(place, out_features, in_features)
    if (place.module, rows) in change.entries:
        raise NetworkFileError(f"{source}: {place.module} is given twice, under two spellings")
    change.entries[(place.module, rows)] = factors
    total = _total_rows(place, rows, in_features)
    previous = change.sizes.get(place.module, (0, 0))
    change.sizes[place.module] = (max(total, previous[0]), in_features or previous[1])


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
