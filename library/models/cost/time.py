"""How long things take: FLOPs from shapes, bytes over PCIe, and a card's peak figures. Estimates, no measurements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from library.models.cost.encoding import LAYERWISE_CAPTIONS, TEXT_BYTES, Encode
from library.models.cost.terms import Picture, Setting, Work, tokens
from library.models.cost.weights import block_index, is_modulation, places
from library.models.encoders import FLUX_ENCODERS, Encoders
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape

EFFICIENCY = 0.65
"""Share of the peak that the matrix products of a step reach."""
ENCODING_EFFICIENCY = 0.40
"""The same while encoding: small batches and convolutions."""
PAGEABLE = 6.0
"""GB/s from RAM that is not page-locked: a thread copies into a locked buffer first."""
VAE_ENCODE_FLOPS, VAE_DECODE_FLOPS = 4.13e6, 9.46e6
"""Of FLUX.1's VAE per pixel (counted), its middle attention apart."""
VAE_ATTENTION_WIDTH, VAE_ATTENTION_CELL = 512, 8


@dataclass(frozen=True)
class Card:
    """A GPU's peak figures: dense TFLOP/s in bf16 (fp32 accumulation) and fp32, practical host-to-device GB/s, GB."""

    name: str
    tflops: float
    fp32: float
    pcie: float
    memory: float


CARDS = (
    Card("RTX 3050", 18.0, 9.1, 12, 8), Card("RTX 3060", 25.5, 12.7, 12, 12), Card("RTX 3070", 40.6, 20.3, 25, 8),
    Card("RTX 3080", 59.5, 29.8, 25, 10), Card("RTX 3090", 71.0, 35.6, 25, 24), Card("RTX 4060", 30.2, 15.1, 12, 8),
    Card("RTX 4070", 58.3, 29.1, 25, 12), Card("RTX 4080", 97.5, 48.7, 25, 16),
    Card("RTX 4090", 165.2, 82.6, 25, 24), Card("RTX 5090", 209.5, 104.8, 50, 32), Card("A100", 312.0, 19.5, 25, 80),
    Card("H100", 798.0, 67.0, 50, 80), Card("H200", 798.0, 67.0, 50, 141),
)  # fmt: skip
REFERENCE_CARD = CARDS[1]


def step_flops(shape: FluxShape, setting: Setting, work: Work) -> float:
    """FLOPs of one step: forward, the input's gradients, and with checkpointing all but each block's last product."""
    linear, last = _product_flops(shape, work.tokens, work.text)
    attention = _attention_flops(shape, work.tokens)
    total = 2 * linear + (1 + 2.5) * attention
    if setting.checkpointing:
        total += linear - last + (0.0 if setting.save_attention else attention)
    return total * work.batch


def _attention_flops(shape: FluxShape, length: int) -> float:
    """FLOPs of attention in one forward pass of one sample."""
    return 4.0 * length * length * shape.hidden * (shape.double_blocks + shape.single_blocks)


@lru_cache(maxsize=64)
def _product_flops(shape: FluxShape, length: int, text: int) -> tuple[float, float]:
    """FLOPs of the blocks' linears in one forward pass of one sample; of these, the blocks' last ones."""
    linear = last = 0.0
    image = length - text
    for path, (out, width) in linear_shapes(shape).items():
        index = block_index(path, shape)
        if index is None or is_modulation(path):
            continue
        rows = length if path.startswith("single") else text if ".txt_" in path else image
        linear += 2.0 * rows * out * width
        last += 2.0 * rows * out * width if path.endswith(("_mlp.2", "linear2")) else 0.0
    return linear, last


def crossing_bytes(shape: FluxShape, setting: Setting, work: Work) -> float:
    """Bytes per step from host to device: streamed blocks twice, offloaded checkpoints once (they leave in duplex)."""
    streamed = places(shape, setting, work.activation_bytes).streamed
    unit = shape.hidden * work.activation_bytes * work.tokens * work.batch
    checkpoints = unit * (shape.double_blocks + shape.single_blocks) if setting.offload else 0.0
    return 2 * streamed + checkpoints


def _copying_seconds(num_bytes: float, setting: Setting, card: Card) -> float:
    rate = card.pcie if setting.pin else min(card.pcie, PAGEABLE)
    return num_bytes / (rate * 1e9)


def step_seconds(shape: FluxShape, setting: Setting, work: Work, card: Card) -> float:
    """Estimated seconds of a forward and backward pass: arithmetic and copies overlap, the slower one counts."""
    compute = step_flops(shape, setting, work) / (card.tflops * 1e12 * EFFICIENCY)
    return max(compute, _copying_seconds(crossing_bytes(shape, setting, work), setting, card))


def painting_seconds(shape: FluxShape, setting: Setting, picture: Picture, text: int, card: Card) -> float:
    """Estimated seconds of one picture (one batch of pictures): every step a forward pass, then the decoding."""
    length = tokens(picture.width, picture.height, text)
    linear, _ = _product_flops(shape, length, text)
    flops = (linear + _attention_flops(shape, length)) * picture.batch
    streamed = places(shape, setting).streamed
    step = max(flops / (card.tflops * 1e12 * EFFICIENCY), _copying_seconds(streamed, setting, card))
    decode = _vae_flops(picture.width, picture.height, VAE_DECODE_FLOPS) * picture.batch
    return picture.steps * step + decode / _vae_speed(picture.vae_bytes, card)


def encoding_seconds(work: Encode, card: Card, encoders: Encoders = FLUX_ENCODERS) -> tuple[float, float]:
    """Estimated seconds of an encoding pass: (captions, images).

    Layer by layer, T5's weights cross to the card once for every LAYERWISE_CAPTIONS captions.
    """
    attention = 4.0 * encoders.t5_layers * work.text**2 * encoders.t5_heads * 64
    products = 2.0 * encoders.t5_layers * encoders.t5_layer * work.text
    compute = work.captions * (products + attention) / (card.tflops * 1e12 * ENCODING_EFFICIENCY)
    if work.layerwise:
        passes = -(-work.captions // LAYERWISE_CAPTIONS)
        compute = max(compute, passes * TEXT_BYTES[work.text_precision] * encoders.t5 / (PAGEABLE * 1e9))
    pictures = work.pixels / max(1, work.width * work.height)
    images = pictures * _vae_flops(work.width, work.height, VAE_ENCODE_FLOPS)
    return compute, images / _vae_speed(work.vae_bytes, card)


def _vae_flops(width: int, height: int, per_pixel: float) -> float:
    cells = (width // VAE_ATTENTION_CELL) * (height // VAE_ATTENTION_CELL)
    return per_pixel * width * height + 4.0 * cells**2 * VAE_ATTENTION_WIDTH


def _vae_speed(activation_bytes: int, card: Card) -> float:
    """FLOP/s of the VAE, which computes in fp32 unless it is told otherwise."""
    return (card.fp32 if activation_bytes == 4 else card.tflops) * 1e12 * ENCODING_EFFICIENCY


def card_named(name: str) -> Card | None:
    """The known card whose name the driver's string contains ('NVIDIA GeForce RTX 3060 Laptop GPU')."""
    found = [card for card in CARDS if card.name in name]
    return max(found, key=lambda card: len(card.name)) if found else None
