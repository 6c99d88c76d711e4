"""Which files a network becomes, by its algorithms and rows alone: asked before it is trained and when it is saved.

So a format that cannot carry a network is refused before weights are loaded, by the rules that writing obeys. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from library.config.tables import SavingTable
from library.errors import NetworkFileError
from library.networks import parts
from library.networks.change import Slot

Format = Literal["kohya", "diffusers", "both"]
Spelling = Literal["kohya", "diffusers", "lycoris"]
LOW_RANK = ("lora", "full")
"""The algorithms that become a LoRA exactly, and so reach every program."""


def saved_as(saving: SavingTable, mixed_precision: str) -> Literal["fp32", "fp16", "bf16"]:
    """save_precision, else the precision of the training's arithmetic: bits beyond it would be noise."""
    if saving.upcast_before_saving:
        return "fp32"
    wanted = saving.save_precision or mixed_precision
    return {"no": "fp32", "float": "fp32"}.get(wanted, wanted)


def files_of(
    kinds: Mapping[Slot, str], sizes: Mapping[str, tuple[int, int]], text: Iterable[str], format: Format
) -> list[Spelling]:
    """The spellings of the files: the first under the plain name, a second beside it.

    kinds: algorithm by (module, rows); sizes: (out, in) by module; text: algorithms on CLIP-L. Raises NetworkFileError
    if the format cannot carry the network, naming what can.
    """
    if format == "diffusers":
        _require_low_rank(kinds, text)
        return ["diffusers"]
    split = [slot for slot, kind in kinds.items() if kind not in LOW_RANK and slot[1] != (0, sizes[slot[0]][0])]
    if split:
        if format == "both":
            raise NetworkFileError(
                f"diffusers cannot load {kinds[split[0]]} on separate linears: use the format kohya, or convert to LoRA"
                " with a rank"
            )
        for slot, kind in kinds.items():
            _require_own_linear(slot, kind, sizes[slot[0]])
        return ["lycoris"]
    low_rank = set(kinds.values()) <= set(LOW_RANK)
    leaves_blocks = any(not parts.is_block(module) for module, _ in kinds)
    if format == "both" or (leaves_blocks and low_rank):
        _require_low_rank(kinds, text)
        return ["kohya", "diffusers"]
    return ["kohya"]


def _require_low_rank(kinds: Mapping[Slot, str], text: Iterable[str]) -> None:
    named = [*((module, kind) for (module, _), kind in kinds.items()), *(("CLIP-L", kind) for kind in text)]
    for module, kind in named:
        if kind not in LOW_RANK:
            raise NetworkFileError(
                f"diffusers cannot load {kind} ({module}): save as kohya, or convert to LoRA with a rank"
            )


def _require_own_linear(slot: Slot, kind: str, size: tuple[int, int]) -> None:
    """LyCORIS's names can say a linear of diffusers as it is, and nothing else."""
    module, rows = slot
    if rows not in [part.rows for part in parts.parts(module, *size)]:
        raise NetworkFileError(f"{kind} on rows {rows} of {module} is no linear of diffusers")
    if module == parts.SWAPPED_HALVES and kind not in LOW_RANK:
        raise NetworkFileError(
            f"{kind} on {module} has no diffusers form: its output halves are exchanged there. Leave the module out"
            " (exclude_patterns), or use the fused layout"
        )
