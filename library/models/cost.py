"""What a FLUX step costs: every formula behind the memory forecast and the estimated seconds per step.

Bytes are exact where they follow from shapes (weights, ring, network, checkpoints) and fitted where they depend on
what autograd keeps (activations; `benchmarks/counters.py` measures them on fake tensors, and a test holds the fit to
them). GB is 1e9 bytes. Imports no torch.

Notation: h hidden width, T tokens of text and image together, B batch, e bytes of an activation (2 in bf16).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from library.models.keymap import linear_shapes
from library.models.shape import FluxShape

GB = 1e9
PIXELS_PER_TOKEN_SIDE = 16

# Bytes per weight of the stored forms (see library/memory/precision.py): values, plus what belongs to a row or block.
PLAIN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
QUANTISED = ("int8", "fp8", "nf4")

# Activations, in units of h * e bytes per token (fitted, within 3% of the fake-tensor runs at 512 and 1024 px):
IN_FLIGHT = 29.1
"""Inside the block that runs backward with checkpointing: what it saved and the gradients on their way."""
PER_RANK = 0.0056
"""More of it per unit of the network's rank."""
SAVED_DOUBLE, SAVED_SINGLE, SAVED_REST = 20.4, 22.2, 5.0
"""Without checkpointing: kept per double block, per single block, and outside of them."""
INFERENCE = 22.0
"""The largest sum of live tensors in a forward pass without gradients."""

CUDA_CONTEXT = 0.45 * GB
"""Driver context and cuBLAS workspaces: outside torch's allocator. 0.3 to 0.6 GB were reported."""
FRAGMENTATION = 1.05
"""What the allocator reserves beyond what is allocated."""
PROCESS_RAM = 2.5 * GB
"""Python, torch and its CUDA libraries."""

OPTIMIZER_BYTES = {
    "AdamW": 8, "AdamW8bit": 2.1, "PagedAdamW": 0, "PagedAdamW8bit": 0, "Lion": 4, "Lion8bit": 1.05,
    "PagedLion8bit": 0, "Adafactor": 4.1, "Prodigy": 16, "AdamWScheduleFree": 8, "RAdamScheduleFree": 8,
    "SGDScheduleFree": 4, "SGD": 4,
}  # fmt: skip
"""Bytes of optimizer state per trained parameter on the device (paged states live in RAM). Others: as AdamW."""
PAGED_BYTES = {"PagedAdamW": 8, "PagedAdamW8bit": 2.1, "PagedLion8bit": 1.05}


@dataclass(frozen=True)
class Setting:
    """How the base is kept and executed: the choices that memory depends on."""

    precision: str = "bf16"
    blocks_to_swap: int = 0
    ring: int = 2
    modulation_on_cpu: bool = False
    checkpointing: bool = True
    offload: bool = False
    keep: tuple[str, ...] = ()
    save_attention: bool = False


@dataclass(frozen=True)
class Work:
    """What one step does: the trained network and the largest batch."""

    trained: int
    rank: int
    optimizer: str
    batch: int
    width: int
    height: int
    text: int
    activation_bytes: int = 2
    optimizer_offload: bool = False
    use_ema: bool = False

    @property
    def tokens(self) -> int:
        """Text and image tokens of one sample."""
        return self.text + (self.width // PIXELS_PER_TOKEN_SIDE) * (self.height // PIXELS_PER_TOKEN_SIDE)


@dataclass
class Memory:
    """Bytes by what they are for; `total` adds them up."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Weights:
    """Bytes of the base by where they may live: per block, modulation, everything else."""

    blocks: tuple[float, ...]
    modulation: float
    other: float
    largest_linear: int

    @property
    def total(self) -> float:
        return sum(self.blocks) + self.modulation + self.other


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
    modulation = other = 0.0
    largest = 0
    for path, (out, width) in linear_shapes(shape).items():
        index = _block_index(path, shape)
        kept = index is None or any(re.search(pattern, path) for pattern in keep)
        weight = out * width * activation_bytes if kept else stored_bytes(out, width, precision)
        other += out * activation_bytes
        if index is None:
            other += weight
        elif "_mod." in path or "modulation." in path:
            modulation += weight
        else:
            blocks[index] += weight
            largest = max(largest, out * width)
    return Weights(tuple(blocks), modulation, other, largest)


def _block_index(path: str, shape: FluxShape) -> int | None:
    kind, _, rest = path.partition(".")
    if kind not in ("double_blocks", "single_blocks"):
        return None
    index = int(rest.split(".")[0])
    return index if kind == "double_blocks" else shape.double_blocks + index


def swapped_blocks(shape: FluxShape, count: int) -> list[int]:
    """The blocks that are streamed: spread evenly, as `library.memory.stream.spread` does it."""
    total = shape.double_blocks + shape.single_blocks
    count = min(count, total)
    return [int((k + 0.5) * total / count) for k in range(count)]


def activations(shape: FluxShape, setting: Setting, work: Work) -> float:
    """Peak bytes of activations and gradients in flight during one training step.

    With checkpointing: an input per block (the checkpoints), and what one block needs while it runs backward.
    Offloaded, only the inputs of the block at hand and the next one are on the device.
    """
    unit = shape.hidden * work.activation_bytes * work.tokens * work.batch
    num_blocks = shape.double_blocks + shape.single_blocks
    in_flight = IN_FLIGHT + PER_RANK * work.rank
    if not setting.checkpointing:
        saved = SAVED_DOUBLE * shape.double_blocks + SAVED_SINGLE * shape.single_blocks + SAVED_REST
        return (saved + PER_RANK * work.rank * num_blocks) * unit
    kept = min(3, num_blocks) if setting.offload else num_blocks
    if setting.save_attention:
        kept += num_blocks
    return (kept + in_flight) * unit


def dequantised(shape: FluxShape, setting: Setting, work: Work, base: Weights) -> float:
    """The one weight that exists in the activations' precision while its linear runs."""
    return base.largest_linear * work.activation_bytes if setting.precision in QUANTISED else 0.0


def training_vram(shape: FluxShape, setting: Setting, work: Work) -> Memory:
    """Device memory of the training command."""
    base = weights(shape, setting, work.activation_bytes)
    swapped = swapped_blocks(shape, setting.blocks_to_swap) if setting.blocks_to_swap else []
    streamed = sum(base.blocks[index] for index in swapped)
    slots = min(setting.ring, len(swapped))
    state = 0.0 if work.optimizer_offload else OPTIMIZER_BYTES.get(work.optimizer, 8) * work.trained
    parts = {
        "base weights": base.total - streamed - (base.modulation if setting.modulation_on_cpu else 0.0),
        "streaming ring": slots * max((base.blocks[index] for index in swapped), default=0.0),
        "network (fp32 weights, gradients)": 8.0 * work.trained,
        "optimizer": state,
        "activations": activations(shape, setting, work),
        "one dequantised weight": dequantised(shape, setting, work, base),
    }
    parts["allocator"] = (FRAGMENTATION - 1) * sum(parts.values())
    parts["CUDA context"] = CUDA_CONTEXT
    return Memory(parts)


def training_ram(shape: FluxShape, setting: Setting, work: Work) -> Memory:
    """Host memory of the training command, beside what the system and the desktop use."""
    base = weights(shape, setting, work.activation_bytes)
    swapped = swapped_blocks(shape, setting.blocks_to_swap) if setting.blocks_to_swap else []
    num_blocks = shape.double_blocks + shape.single_blocks
    unit = shape.hidden * work.activation_bytes * work.tokens * work.batch
    state = OPTIMIZER_BYTES.get(work.optimizer, 8) if work.optimizer_offload else PAGED_BYTES.get(work.optimizer, 0)
    parts = {
        "process": PROCESS_RAM,
        "streamed blocks (page-locked)": sum(base.blocks[index] for index in swapped),
        "modulation weights": base.modulation if setting.modulation_on_cpu else 0.0,
        "offloaded checkpoints (page-locked)": unit * num_blocks if setting.offload else 0.0,
        "optimizer": state * work.trained,
        "moving average": 4.0 * work.trained if work.use_ema else 0.0,
        "the tensor being loaded": 3.0 * base.largest_linear * 2,
    }
    return Memory(parts)


def inference_vram(shape: FluxShape, setting: Setting, work: Work) -> Memory:
    """Device memory of denoising without gradients (the VAE decodes after the transformer's activations are gone)."""
    train = training_vram(shape, setting, work).parts
    unit = shape.hidden * work.activation_bytes * work.tokens * work.batch
    parts = {name: train[name] for name in ("base weights", "streaming ring", "one dequantised weight")}
    parts["network"] = 2.0 * work.trained
    parts["activations"] = max(INFERENCE * unit, vae_activations(work.width, work.height, 1))
    parts["allocator"] = (FRAGMENTATION - 1) * sum(parts.values())
    parts["CUDA context"] = CUDA_CONTEXT
    return Memory(parts)


T5_PARAMETERS, T5_LAYER, T5_EMBEDDING, CLIP_PARAMETERS, VAE_PARAMETERS = 4.762e9, 1.93e8, 1.315e8, 1.23e8, 8.4e7
"""Parameters of T5-XXL's encoder, one of its 24 layers, its embedding; of CLIP-L's text half; of the VAE."""
VAE_CHANNELS, VAE_LIVE = 128, 4.0
"""Channels of the VAE's widest stage at full resolution, and how many such tensors live at once (fp32)."""


def vae_activations(width: int, height: int, batch: int) -> float:
    """Peak bytes of the VAE in fp32, encoding or decoding."""
    return VAE_LIVE * VAE_CHANNELS * width * height * 4.0 * batch


def caching_vram(width: int, height: int, batch: int, layerwise: bool) -> dict[str, Memory]:
    """Device memory of the caching command's two phases, which never overlap."""
    t5 = 2 * T5_LAYER if layerwise else T5_PARAMETERS
    hidden = 16 * 512 * 10240 * 2.0
    text = {"T5": 2 * t5, "CLIP": 2 * CLIP_PARAMETERS, "activations": hidden, "CUDA context": CUDA_CONTEXT}
    images = {
        "VAE (fp32)": 4 * VAE_PARAMETERS,
        "activations": vae_activations(width, height, batch),
        "CUDA context": CUDA_CONTEXT,
    }
    return {"text encoders": Memory(text), "VAE": Memory(images)}


# --- time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU's peak figures: dense bf16 TFLOP/s with fp32 accumulation, and practical host-to-device GB/s."""

    name: str
    tflops: float
    pcie: float
    memory: float


CARDS = (
    Card("RTX 3050", 18.0, 12, 8), Card("RTX 3060", 25.5, 12, 12), Card("RTX 3070", 40.6, 25, 8),
    Card("RTX 3080", 59.5, 25, 10), Card("RTX 3090", 71.0, 25, 24), Card("RTX 4060", 30.2, 12, 8),
    Card("RTX 4070", 58.3, 25, 12), Card("RTX 4080", 97.5, 25, 16), Card("RTX 4090", 165.2, 25, 24),
    Card("RTX 5090", 209.5, 50, 32), Card("A100", 312.0, 25, 80), Card("H100", 798.0, 50, 80),
    Card("H200", 798.0, 50, 141),
)  # fmt: skip
REFERENCE_CARD = CARDS[1]
EFFICIENCY = 0.65
"""Share of the peak that the matrix products of a step reach."""


def step_flops(shape: FluxShape, setting: Setting, work: Work) -> float:
    """FLOPs of one step: forward, the input's gradients, and with checkpointing all but each block's last product."""
    tokens = work.tokens
    linear, last = _product_flops(shape, tokens, work.text)
    attention = 4.0 * tokens * tokens * shape.hidden * (shape.double_blocks + shape.single_blocks)
    total = 2 * linear + (1 + 2.5) * attention
    if setting.checkpointing:
        total += linear - last + (0.0 if setting.save_attention else attention)
    return total * work.batch


@lru_cache(maxsize=64)
def _product_flops(shape: FluxShape, tokens: int, text: int) -> tuple[float, float]:
    """FLOPs of the blocks' linears in one forward pass of one sample; of these, the blocks' last ones."""
    linear = last = 0.0
    image = tokens - text
    for path, (out, width) in linear_shapes(shape).items():
        index = _block_index(path, shape)
        if index is None or "_mod." in path or "modulation." in path:
            continue
        rows = tokens if path.startswith("single") else text if ".txt_" in path else image
        linear += 2.0 * rows * out * width
        last += 2.0 * rows * out * width if path.endswith(("_mlp.2", "linear2")) else 0.0
    return linear, last


def crossing_bytes(shape: FluxShape, setting: Setting, work: Work) -> float:
    """Bytes per step from host to device: streamed blocks twice, offloaded checkpoints once (they leave in duplex)."""
    base = weights(shape, setting, work.activation_bytes)
    swapped = swapped_blocks(shape, setting.blocks_to_swap) if setting.blocks_to_swap else []
    streamed = sum(base.blocks[index] for index in swapped)
    unit = shape.hidden * work.activation_bytes * work.tokens * work.batch
    checkpoints = unit * (shape.double_blocks + shape.single_blocks) if setting.offload else 0.0
    return 2 * streamed + checkpoints


def step_seconds(shape: FluxShape, setting: Setting, work: Work, card: Card) -> float:
    """Estimated seconds per step: arithmetic and copies overlap, so the slower of the two. An estimate, no more."""
    compute = step_flops(shape, setting, work) / (card.tflops * 1e12 * EFFICIENCY)
    return max(compute, crossing_bytes(shape, setting, work) / (card.pcie * 1e9))


def inference_seconds(shape: FluxShape, setting: Setting, work: Work, card: Card) -> float:
    """Estimated seconds of one prediction without gradients: streamed blocks cross once."""
    linear, _ = _product_flops(shape, work.tokens, work.text)
    attention = 4.0 * work.tokens * work.tokens * shape.hidden * (shape.double_blocks + shape.single_blocks)
    compute = (linear + attention) * work.batch / (card.tflops * 1e12 * EFFICIENCY)
    base = weights(shape, setting, work.activation_bytes)
    swapped = swapped_blocks(shape, setting.blocks_to_swap) if setting.blocks_to_swap else []
    return max(compute, sum(base.blocks[index] for index in swapped) / (card.pcie * 1e9))


def card_named(name: str) -> Card | None:
    """The known card whose name the driver's string contains ('NVIDIA GeForce RTX 3060 Laptop GPU')."""
    found = [card for card in CARDS if card.name in name]
    return max(found, key=lambda card: len(card.name)) if found else None
