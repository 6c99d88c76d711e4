"""Turn the memory table into a loaded transformer and the way its blocks are executed."""

from __future__ import annotations

import torch

from library.config.tables.memory import MemoryTable
from library.memory.attention import Attention
from library.memory.device import release
from library.memory.offload import InHostMemory
from library.models import quantized
from library.models.checkpoint_file import TransformerFile
from library.models.compiled import compile_elementwise
from library.models.flux import FluxTransformer
from library.models.load import Residence, load_transformer, plain_name


def residence(memory: MemoryTable, dtype: torch.dtype, num_blocks: int) -> Residence:
    """The part of the table that says in which precision weights are kept, and where."""
    swapped = num_blocks if memory.blocks_to_swap == "all" else min(memory.blocks_to_swap, num_blocks)
    precision = memory.base_precision or plain_name(dtype)
    return Residence(
        precision=precision,
        arithmetic={"int8": memory.int8_arithmetic, "fp8": memory.fp8_arithmetic}.get(precision, False),
        keep=tuple(memory.keep_precision_patterns),
        blocks_to_swap=swapped,
        ring=memory.swap_ring_size,
        pin=memory.pin_memory,
        modulation_on_cpu=memory.modulation_on_cpu,
    )


def load(
    file: TransformerFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    memory: MemoryTable | None = None,
) -> FluxTransformer:
    """The frozen transformer as the memory table wants it."""
    model = _load(file, device, dtype or torch.float32, memory)
    # What quantising needed in between is given back: on a small card the first step could not use it in its pieces.
    release(model.device)
    return model


def _load(
    file: TransformerFile, device: torch.device | str, dtype: torch.dtype, memory: MemoryTable | None
) -> FluxTransformer:
    if memory is None:
        return load_transformer(file, device, dtype)
    blocks = file.shape.double_blocks + file.shape.single_blocks
    attention = Attention(memory.attention_backend)
    wanted = residence(memory, dtype, blocks)
    folder = memory.save_quantized_base
    if folder is None:
        return load_transformer(file, device, dtype, wanted, attention)
    quantized.require_quantised(wanted.precision, folder)
    about = quantized.description(file.reader.files, wanted, plain_name(dtype), file.shape)
    with quantized.one_at_a_time(folder):
        if not (folder / quantized.DESCRIPTION).is_file():
            model = load_transformer(file, device, dtype, wanted, attention)
            quantized.save(model, folder, about)
            return model
    return load_transformer(quantized.QuantizedFile(folder, about), device, dtype, wanted, attention)


def set_up_training(model: FluxTransformer, memory: MemoryTable) -> None:
    """Checkpointing, activation offload and compilation, as the memory table says; call it before the first step.

    What this device cannot do was refused by `feasible` before the weights were loaded.
    """
    runner = model.runner
    runner.checkpointing = memory.gradient_checkpointing or memory.cpu_offload_checkpointing
    if memory.cpu_offload_checkpointing:
        runner.keeper = InHostMemory(model.device, memory.pin_memory)
    if memory.save_attention_outputs:
        assert runner.checkpointing
        runner.keep_attention = True
    set_up_prediction(model, memory)


def set_up_prediction(model: FluxTransformer, memory: MemoryTable) -> None:
    """Compilation, as the memory table says: all there is to set up where nothing is trained."""
    if memory.torch_compile:
        compile_elementwise(model.ops, memory.dynamo_backend)
