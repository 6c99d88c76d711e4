"""Running out of memory: recognised in all its spellings, and answered with the next knob to turn."""

import torch

from library.config.tables import MemoryTable

GIGABYTE = 1 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the RAM is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def advice(error: BaseException, bucket: tuple[int, int], memory: MemoryTable, device: torch.device) -> str:
    """What happened, in which bucket, at which peak, and the settings that lower it, the cheapest first."""
    peak = ""
    if device.type == "cuda":
        peak = f" after a peak of {torch.cuda.max_memory_reserved(device) / GIGABYTE:.1f} GB"
    knobs = [knob for applies, knob in _knobs(memory) if applies]
    return (
        f"out of memory{peak}, in a batch of {bucket[0]} x {bucket[1]} pixels ({str(error).splitlines()[0]}). "
        f"Next to try, one at a time: {'; '.join(knobs[:3])}."
    )


def _knobs(memory: MemoryTable) -> list[tuple[bool, str]]:
    return [
        (not memory.gradient_checkpointing, "gradient_checkpointing = true"),
        (memory.base_precision in (None, "bf16", "fp16", "fp32"), 'base_precision = "int8"'),
        (memory.blocks_to_swap == 0, "blocks_to_swap = 18"),
        (not memory.cpu_offload_checkpointing, "cpu_offload_checkpointing = true"),
        (memory.base_precision != "nf4", 'base_precision = "nf4"'),
        (memory.blocks_to_swap != "all", 'blocks_to_swap = "all"'),
        (True, "a smaller train_batch_size"),
        (True, "a smaller resolution"),
    ]
