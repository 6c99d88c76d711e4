"""The base's bytes: by precision, by block, and by where they live under a setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from library.models.cost.terms import Setting
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape

# Bytes per weight of the stored forms (see library/memory/precision.py): values, plus what belongs to a row or block.
PLAIN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
QUANTISED = ("int8", "fp8", "nf4")
VECTOR_LAYERS = ("time_in", "vector_in", "guidance_in", "final_layer.adaLN_modulation")
"""Outside the blocks, the layers of `FluxTransformer.vector_linears`."""


FULL_MODEL = 1_000_000_000
"""Parameters from which a base is no toy: smaller ones are trained on a CPU, where a forecast means nothing."""


@dataclass(frozen=True)
class Weights:
    """Bytes of the base by where they may live: per block, modulation, everything else.

    vectors: of everything else, the layers that act on one vector per sample and go where modulation goes.
    """

    blocks: tuple[float, ...]
    modulation: float
    other: float
    largest_linear: int
    vectors: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.blocks) + self.modulation + self.other


@dataclass(frozen=True)
class Places:
    """Bytes of the base by where they are: resident on the device, its ring, streamed from RAM, modulation in RAM."""

    resident: float
    ring: float
    streamed: float
    modulation: float
    largest_block: float


def num_parameters(shape: FluxShape) -> int:
    """Weights of the transformer's linears: 11.9e9 for FLUX.1 Fill."""
    return sum(out * width for out, width in linear_shapes(shape).values())


def is_toy(shape: FluxShape) -> bool:
    """Whether the base is smaller than anything that a forecast is made for."""
    return num_parameters(shape) < FULL_MODEL


def stored_bytes(out_features: int, in_features: int, precision: str) -> float:
    """Bytes of one linear's stored weight."""
    if precision in ("int8", "fp8"):
        return out_features * (in_features + 2)
    if precision == "nf4":
        return out_features * in_features * NF4_BYTES
    return out_features * in_features * PLAIN_BYTES[precision]


def weights(shape: FluxShape, setting: Setting, activation_bytes: int = 2) -> Weights:
    """The base's bytes in a setting's precision. Kept modules, biases and norms have the activations' width."""
    return _weights(shape, setting.precision, setting.keep, activation_bytes)


@lru_cache(maxsize=64)
def _weights(shape: FluxShape, precision: str, keep: tuple[str, ...], activation_bytes: int) -> Weights:
    blocks = [0.0] * (shape.double_blocks + shape.single_blocks)
    modulation = other = vectors = 0.0
    largest = 0
    for path, (out, width) in linear_shapes(shape).items():
        index = block_index(path, shape)
        kept = index is None or any(re.search(pattern, path) for pattern in keep)
        weight = out * width * activation_bytes if kept else stored_bytes(out, width, precision)
        other += out * activation_bytes
        if index is None:
            other += weight
            vectors += weight if path.startswith(VECTOR_LAYERS) else 0.0
        elif is_modulation(path):
            modulation += weight
        else:
            blocks[index] += weight
            largest = max(largest, out * width)
    return Weights(tuple(blocks), modulation, other, largest, vectors)


def is_modulation(path: str) -> bool:
    """Whether a linear of a block makes its modulation."""
    return "_mod." in path or "modulation." in path


def block_index(path: str, shape: FluxShape) -> int | None:
    """The block a linear belongs to, double blocks first; None outside of the blocks."""
    kind, _, rest = path.partition(".")
    if kind not in ("double_blocks", "single_blocks"):
        return None
    index = int(rest.split(".")[0])
    return index if kind == "double_blocks" else shape.double_blocks + index


def swapped_blocks(shape: FluxShape, count: int) -> list[int]:
    """The blocks that are streamed: spread evenly, as `library.memory.stream.spread` does it."""
    if not count:
        return []
    total = shape.double_blocks + shape.single_blocks
    count = min(count, total)
    return [int((k + 0.5) * total / count) for k in range(count)]


def places(shape: FluxShape, setting: Setting, activation_bytes: int = 2) -> Places:
    """Where a setting puts the base."""
    base = weights(shape, setting, activation_bytes)
    swapped = swapped_blocks(shape, setting.blocks_to_swap)
    streamed = sum(base.blocks[index] for index in swapped)
    block = max((base.blocks[index] for index in swapped), default=0.0)
    modulation = base.modulation + base.vectors if setting.modulation_on_cpu else 0.0
    return Places(
        base.total - streamed - modulation, min(setting.ring, len(swapped)) * block, streamed, modulation, block
    )


def dequantised(setting: Setting, base: Weights, activation_bytes: int = 2) -> float:
    """The one weight that exists in the activations' precision while its linear runs."""
    return base.largest_linear * activation_bytes if setting.precision in QUANTISED else 0.0


def base_on_device(shape: FluxShape, setting: Setting, activation_bytes: int = 2) -> dict[str, float]:
    """Device memory of the base, as parts of a phase."""
    place = places(shape, setting, activation_bytes)
    return {"base weights": place.resident, "streaming ring": place.ring}


def base_in_ram(shape: FluxShape, setting: Setting, activation_bytes: int = 2) -> tuple[dict[str, float], float]:
    """Host memory of the base as parts, and how much of it is page-locked.

    Blocks that are not locked are copied through two locked buffers (`library.memory.stream`).
    """
    place = places(shape, setting, activation_bytes)
    base = weights(shape, setting, activation_bytes)
    parts = {
        _locked("streamed blocks", setting.pin): place.streamed,
        "modulation weights": place.modulation,
        "the tensor being loaded": 3.0 * base.largest_linear * 2,
    }
    if setting.pin or not place.streamed:
        return parts, place.streamed
    parts["staging buffers (page-locked)"] = 2 * place.largest_block
    return parts, 2 * place.largest_block


def _locked(name: str, pin: bool) -> str:
    return f"{name} (page-locked)" if pin else name
