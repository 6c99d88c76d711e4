"""A `Change` in the spellings that files have: kohya's fused modules, PEFT's and LyCORIS's separate linears."""

import torch
from torch import Tensor

from library.errors import NetworkFileError
from library.networks import factors as arithmetic
from library.networks import names, parts
from library.networks.change import Change, diffusers_order, halves_exchanged
from library.networks.factors import DOWN, UP, Factors
from library.networks.parts import Rows


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
                _put(tensors, names.peft_stem(part.diffusers), diffusers_order(module, piece), dtype, kohya=False)
    for diffusers, bias in _split_biases(change).items():
        tensors[f"{names.peft_stem(diffusers)}.diff_b"] = bias.to(dtype)
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
                _put(tensors, names.lycoris_stem(part.diffusers), diffusers_order(module, plain), dtype, kohya=True)
                break
        else:
            raise NetworkFileError(f"{factors.kind} on rows {rows} of {module} is no linear of diffusers")
    for diffusers, bias in _split_biases(change).items():
        tensors[f"{names.lycoris_stem(diffusers)}.diff_b"] = bias.to(dtype)
    for module, factors in change.text.items():
        _put(tensors, names.kohya_text_stem(module), arithmetic.folded(factors), dtype, kohya=True)
    return tensors


def _split_biases(change: Change) -> dict[str, Tensor]:
    """The changes of biases by diffusers linear, in its own order."""
    found = {}
    for module, bias in change.biases.items():
        names_of_parts = parts.diffusers_names(module)
        hidden = bias.shape[0] // {1: 1, 3: 3, 4: 7}[len(names_of_parts)]
        for part in parts.parts(module, bias.shape[0], hidden):
            piece = bias[part.start : part.stop]
            found[part.diffusers] = halves_exchanged(piece) if module == parts.SWAPPED_HALVES else piece
    return found


def _put(tensors: dict[str, Tensor], stem: str, factors: Factors, dtype: torch.dtype, *, kohya: bool) -> None:
    """Write one module's tensors. alpha is a 0-dim float: diffusers refuses integers, sd-scripts a missing one."""
    rename = {} if kohya else {DOWN: "lora_A.weight", UP: "lora_B.weight"}
    for name, tensor in factors.tensors.items():
        tensors[f"{stem}.{rename.get(name, name)}"] = tensor.to(dtype).contiguous()
    alpha = (factors.alpha or 0.0) if factors.kind == "oft" else float(factors.rank)
    tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
