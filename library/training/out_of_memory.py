"""Running out of memory: recognised in all its spellings, and answered with the next knob to turn."""

from dataclasses import dataclass

import torch

from library.config.tables import CacheTable, MemoryTable

GIGABYTE = 1e9
MOST_KNOBS = 3


@dataclass(frozen=True)
class Moment:
    """What was being done, in words. picture: something painted between steps. decoding: by the VAE."""

    words: str
    picture: bool = False
    decoding: bool = False


BETWEEN_STEPS = Moment("what is made between two steps (previews, measurements)", picture=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the RAM is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


_BINDING = (" (and influx_cache.py again)", "a smaller train_batch_size", "a smaller resolution")


def advice(
    error: BaseException,
    moment: Moment,
    memory: MemoryTable,
    cache: CacheTable,
    device: torch.device,
    begun: bool = False,
) -> str:
    """What happened, at which moment, at which peak, and the settings that lower it, the cheapest first.

    begun: the run has finished a step; what it is made of then binds it, and changing that needs a new run.
    """
    peak = ""
    if device.type == "cuda":
        peak = f" after a peak of {torch.cuda.max_memory_reserved(device) / GIGABYTE:.1f} GB"
    asked = [*(_picture_knobs(moment, cache) if moment.picture else []), *_knobs(memory, moment.picture)]
    knobs = [knob for applies, knob in asked if applies]
    new_run = [knob for knob in knobs if begun and knob.endswith(_BINDING)]
    knobs = [knob for knob in knobs if knob not in new_run]
    if len(knobs) < MOST_KNOBS:
        knobs += [f"in a new run (--fresh, with network_weights = what this one saved): {knob}" for knob in new_run]
    return (
        f"out of memory{peak}, in {moment.words} ({str(error).splitlines()[0] if str(error) else 'no details'}). "
        f"Next to try, one at a time: {'; '.join(knobs[:MOST_KNOBS])}."
    )


def _picture_knobs(moment: Moment, cache: CacheTable) -> list[tuple[bool, str]]:
    """vae_tiling and vae_dtype belong to the cache, which is then made anew."""
    return [
        (moment.decoding and not cache.vae_tiling, "vae_tiling = true (and influx_cache.py again)"),
        (
            True,
            "a smaller picture (--w, --h of its prompt, or validation_width and validation_height, and cache again)",
        ),
        (moment.decoding and cache.vae_dtype == "fp32", 'vae_dtype = "bf16" (and influx_cache.py again)'),
    ]


def _knobs(memory: MemoryTable, picture: bool) -> list[tuple[bool, str]]:
    return [
        (not memory.gradient_checkpointing and not picture, "gradient_checkpointing = true"),
        (memory.base_precision in (None, "bf16", "fp16", "fp32"), 'base_precision = "int8"'),
        (memory.blocks_to_swap == 0, "blocks_to_swap = 18"),
        (not memory.cpu_offload_checkpointing and not picture, "cpu_offload_checkpointing = true"),
        (memory.base_precision != "nf4", 'base_precision = "nf4"'),
        (memory.blocks_to_swap != "all", 'blocks_to_swap = "all"'),
        (not memory.optimizer_offload, "optimizer_offload = true"),
        (True, "a smaller train_batch_size"),
        (True, "a smaller resolution"),
    ]
