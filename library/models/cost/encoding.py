"""Memory of text encoders and VAE, of painting a picture, and so the phases of caching and inference.

Phases follow each other and never overlap: text encoders, VAE, then the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.models.cost.terms import CUDA_CONTEXT, PROCESS_RAM, Memory, Picture, Setting, Work, on_device, tokens
from library.models.cost.weights import base_in_ram, base_on_device, dequantised, weights
from library.models.encoders import FLUX_ENCODERS, VAE_TILE, Encoders
from library.models.shape import FluxShape

INFERENCE = 22.0
"""The transformer's largest sum of live tensors in a forward pass without gradients, in units of h * e per token."""
VAE_DECODES, VAE_ENCODES = 6.0, 5.0
"""Tensors as large as the VAE's full-resolution stage that live at once (exact on fake tensors, at every size). What
cuDNN's convolutions take beside them is not counted: where it finds no room, it chooses an algorithm without."""
TILED_RESULT = 1.05
"""A tiled picture beside its largest tile."""
T5_LIVE = 6.0
"""Tensors as wide as T5's feed-forward layer that live at once."""
TEXT_BYTES = {"bf16": 2, "fp32": 4, "int8": 1, "fp8": 1}
"""Bytes of a T5 weight by t5xxl_precision."""

LAYERWISE_BATCH, LAYERWISE_CAPTIONS, WHOLE_T5_BYTES = 8, 512, 14e9
"""As in library/models/text.py, which imports torch; a test compares them."""
CAPTION_COPIES = 3
"""A layer's input, its outputs, and these as one tensor."""
SHARDS_IN_FLIGHT = 0.5e9
"""Encoded entries that wait to be written."""


@dataclass(frozen=True)
class Encode:
    """What an encoding pass does.

    captions: how many are encoded. text: T5's tokens. layerwise: T5 stays in RAM and visits the device layer by layer.
    text_batch: captions at once if not. pixels: of all pictures together. width, height, images_at_once: of the VAE's
    largest batch. vae_bytes: of one of its activations. pictures_in_flight: decoded pictures that wait in RAM.
    """

    captions: int
    pixels: int
    width: int
    height: int
    text: int = 512
    layerwise: bool = False
    text_precision: str = "bf16"
    text_batch: int = 8
    images_at_once: int = 1
    vae_bytes: int = 4
    tiling: bool = False
    pictures_in_flight: int = 2


def vae_activations(picture: Picture, encoders: Encoders = FLUX_ENCODERS, encode: bool = False) -> float:
    """Peak bytes of the VAE at work on a batch of pictures."""
    live = VAE_ENCODES if encode else VAE_DECODES
    width, height = picture.width, picture.height
    tiled = picture.tiling and max(width, height) > VAE_TILE
    if tiled:
        width, height = min(width, VAE_TILE), min(height, VAE_TILE)
    whole = live * encoders.vae_width * width * height * picture.vae_bytes * picture.batch
    return whole * (TILED_RESULT if tiled else 1.0)


def denoising(
    shape: FluxShape, setting: Setting, picture: Picture, text: int, activation_bytes: int = 2
) -> dict[str, float]:
    """Device memory of one forward pass without gradients, beside the base."""
    unit = shape.hidden * activation_bytes * tokens(picture.width, picture.height, text) * picture.batch
    base = weights(shape, setting, activation_bytes)
    return {
        "activations": INFERENCE * unit,
        "one dequantised weight": dequantised(setting, base, activation_bytes),
    }


def decoding(picture: Picture, encoders: Encoders = FLUX_ENCODERS) -> dict[str, float]:
    """Device memory of decoding one picture, beside whatever else is there."""
    one = Picture(picture.width, picture.height, 1, picture.vae_bytes, picture.tiling)
    return {
        "VAE decoder": float(picture.vae_bytes) * encoders.vae_decoder,
        "VAE activations": vae_activations(one, encoders),
    }


def _text_on_device(work: Encode, encoders: Encoders) -> Memory:
    size = TEXT_BYTES[work.text_precision]
    arithmetic = 4 if work.text_precision == "fp32" else 2
    # layer by layer: the layer that computes, and the one that arrives
    t5 = size * (2.0 * encoders.t5_layer if work.layerwise else encoders.t5)
    batch = min(work.captions, LAYERWISE_BATCH if work.layerwise else work.text_batch)
    inner = T5_LIVE * batch * work.text * encoders.t5_inner
    bias = encoders.t5_heads * work.text**2
    return on_device({"T5": t5, "CLIP": float(arithmetic) * encoders.clip, "activations": arithmetic * (inner + bias)})


def text_in_ram(work: Encode, encoders: Encoders = FLUX_ENCODERS) -> dict[str, float]:
    """Host memory of the text encoders' phase: T5 where it lives in RAM, and the captions between its layers."""
    arithmetic = 4 if work.text_precision == "fp32" else 2
    if not work.layerwise:
        # weights go to the device one by one, but for those that are quantised first
        quantising = work.text_precision in ("int8", "fp8")
        return {"T5, being quantised": arithmetic * float(encoders.t5) if quantising else 0.0}
    waiting = min(work.captions, LAYERWISE_CAPTIONS)
    states = CAPTION_COPIES * waiting * work.text * encoders.t5_width * arithmetic
    # quantised linear by linear after it was read whole
    return {"T5": arithmetic * float(encoders.t5), "captions between its layers": float(states)}


def caching_phases(work: Encode, encoders: Encoders = FLUX_ENCODERS) -> dict[str, Memory]:
    """Device memory of the caching command's phases."""
    batch = Picture(work.width, work.height, work.images_at_once, work.vae_bytes, work.tiling)
    images = {
        "VAE encoder": float(work.vae_bytes) * encoders.vae_encoder,
        "activations": vae_activations(batch, encoders, encode=True),
    }
    phases = {}
    if work.captions:
        phases["text encoders"] = _text_on_device(work, encoders)
    if work.pixels:
        phases["VAE"] = on_device(images)
    return phases or {"nothing to encode": Memory({"CUDA context": CUDA_CONTEXT})}


def caching_ram(work: Encode, encoders: Encoders = FLUX_ENCODERS) -> dict[str, Memory]:
    """Host memory of the caching command's phases."""
    picture = 3 * 4.0 * work.width * work.height
    phases = {
        "text encoders": Memory(
            {"process": PROCESS_RAM, **text_in_ram(work, encoders), "entries to be written": SHARDS_IN_FLIGHT}
        ),
        "VAE": Memory(
            {
                "process": PROCESS_RAM,
                # target and condition in fp32, and the file's own pixels
                "decoded pictures": 3 * picture * work.pictures_in_flight,
                "entries to be written": SHARDS_IN_FLIGHT,
            }
        ),
    }
    wanted = {"text encoders": work.captions, "VAE": work.pixels}
    return {name: memory for name, memory in phases.items() if wanted[name]} or {
        "nothing to encode": Memory({"process": PROCESS_RAM})
    }


def inference_phases(shape: FluxShape, setting: Setting, work: Work, encode: Encode | None = None) -> dict[str, Memory]:
    """Device memory of the inference command's phases; without `encode`, of those that the setting decides."""
    assert work.preview is not None
    picture, encoders = work.preview, work.encoders
    held = {**base_on_device(shape, setting, work.activation_bytes), "networks": work.network_bytes}
    decoder = float(picture.vae_bytes) * encoders.vae_decoder
    paint = denoising(shape, setting, picture, work.text, work.activation_bytes)
    phases = caching_phases(encode, encoders) if encode is not None else {}
    if encode is not None:
        phases["condition (VAE encoder)"] = phases.pop("VAE")
    phases["denoising"] = on_device({**held, "VAE decoder": decoder, **paint})
    phases["VAE decoding"] = on_device({**held, **decoding(picture, encoders)})
    return phases


def inference_ram(shape: FluxShape, setting: Setting, work: Work, encode: Encode | None = None) -> dict[str, Memory]:
    """Host memory of the inference command's phases; without `encode`, of those that the setting decides."""
    base, locked = base_in_ram(shape, setting, work.activation_bytes)
    phases = {}
    waiting = 0.0
    if encode is not None:
        phases["text encoders"] = Memory({"process": PROCESS_RAM, **text_in_ram(encode, work.encoders)})
        arithmetic = 4 if encode.text_precision == "fp32" else 2
        waiting = float(encode.captions * encode.text * work.encoders.t5_width * arithmetic)
    phases["denoising"] = Memory({"process": PROCESS_RAM, **base, "encoded prompts": waiting}, locked)
    return phases
