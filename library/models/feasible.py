"""What the memory table asks of a device, checked before weights are loaded; a refusal names the key and a way out."""

from __future__ import annotations

import torch

from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.memory.attention import can_remember
from library.memory.capability import Capability
from library.memory.precision import PLAIN_DTYPES
from library.models import budget, cost
from library.models.cost import GB
from library.models.shape import FluxShape

FP8_ARITHMETIC = (8, 9)
INT8_ARITHMETIC = (7, 5)
ROOMY = 0.95
"""How much of a card the base's weights may fill, if anything is to be computed with them."""


def require(memory: MemoryTable, shape: FluxShape, dtype: torch.dtype, able: Capability) -> None:
    """Raise ConfigError for what this device cannot do with activations in `dtype`."""
    _require_arithmetic(memory, able)
    _require_room(memory, shape, dtype, able)
    _require_compiler(memory)
    if memory.attention_backend != "auto":
        works = able.backends(dtype)
        if memory.attention_backend not in works:
            raise ConfigError(
                f"attention_backend = {memory.attention_backend} does not work on {able} with {_named(dtype)}"
                f" activations; there are {', '.join(works)}: auto takes the fastest of them"
            )


def require_training(memory: MemoryTable, dtype: torch.dtype, able: Capability) -> None:
    """Raise ConfigError for what this device, or this choice of keys, cannot do in training."""
    if not memory.save_attention_outputs:
        return
    if not (memory.gradient_checkpointing or memory.cpu_offload_checkpointing):
        raise ConfigError("save_attention_outputs needs gradient_checkpointing = true: without it all is kept anyway")
    if not can_remember(able.kind, able.compute, dtype):
        raise ConfigError(
            "save_attention_outputs needs flash attention (bf16 or fp16 activations on a card of compute capability"
            f" 8.0 or newer), but this is {able} with {_named(dtype)}: remove the key"
        )


def _require_arithmetic(memory: MemoryTable, able: Capability) -> None:
    if memory.base_precision == "fp8" and memory.fp8_arithmetic and (able.below(FP8_ARITHMETIC) or able.kind == "mps"):
        raise ConfigError(
            f"fp8_arithmetic = true, but {able} cannot multiply in fp8 (that takes 8.9 or newer, as RTX 40). Remove"
            ' the key: the base stays in fp8, the arithmetic is as without it. Or base_precision = "int8" with'
            " int8_arithmetic = true"
        )
    if memory.base_precision == "int8" and memory.int8_arithmetic:
        if able.below(INT8_ARITHMETIC) or able.kind == "mps":
            raise ConfigError(
                f"int8_arithmetic = true, but {able} cannot multiply in int8 (that takes 7.5 or newer, as RTX 20)."
                " Remove the key: the base stays in int8, the arithmetic is as without it"
            )


def _require_compiler(memory: MemoryTable) -> None:
    if not memory.torch_compile:
        return
    known = torch._dynamo.list_backends(exclude_tags=())
    if memory.dynamo_backend not in known:
        raise ConfigError(
            f"dynamo_backend = {memory.dynamo_backend!r} is no compiler that this torch has:"
            f" {', '.join(sorted(known))}. inductor is the one to use"
        )


def _require_room(memory: MemoryTable, shape: FluxShape, dtype: torch.dtype, able: Capability) -> None:
    """The weights that stay on the card must leave room for anything else."""
    if able.memory is None:
        return
    setting = budget.setting_of(memory, shape, _named(dtype))
    size = cost.places(shape, setting, dtype.itemsize).resident
    if size <= ROOMY * able.memory:
        return
    unset = ""
    if not memory.base_precision:
        unset = f", as base_precision is not set{'' if able.bf16 else ' (this card has no bf16)'},"
    raise ConfigError(
        f"the base in {setting.precision}{unset} fills {size / GB:.1f} GB of {able.name}'s"
        f' {able.memory / GB:.1f} GB. Set base_precision = "int8" (half of bf16) or "nf4" (a quarter), blocks_to_swap,'
        f" or vram_budget_gb = {able.memory // GB:.0f} to have it chosen"
    )


def _named(dtype: torch.dtype) -> str:
    return next(name for name, known in PLAIN_DTYPES.items() if known == dtype)
