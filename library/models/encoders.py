"""How large a base's text encoders and VAE are, from their headers: what the plan counts with. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from library.errors import ModelError

if TYPE_CHECKING:
    from library.models.base import Base
    from library.models.readers import Reader

VAE_TILE = 512
"""Side of the tiles of `vae_tiling`, in pixels. diffusers' own are as large as the VAE's sample_size: 1024 px for
FLUX.1, which saves nothing up to 1024 px, and 32 px for a VAE without a configuration, which shows seams."""


@dataclass(frozen=True)
class Encoders:
    """Parameters and widths; the defaults are FLUX.1's own (T5-XXL, CLIP-L, its VAE).

    t5_layer: of the largest layer. vae_width: channels of the VAE at full resolution.
    """

    t5: int = 4_762_310_656
    t5_layer: int = 192_948_224
    t5_width: int = 4096
    t5_inner: int = 10_240
    t5_heads: int = 64
    t5_layers: int = 24
    clip: int = 123_060_480
    clip_width: int = 768
    clip_layers: int = 12
    vae_encoder: int = 34_274_208
    vae_decoder: int = 49_545_475
    vae_width: int = 128


FLUX_ENCODERS = Encoders()


def encoders_of(base: Base) -> Encoders:
    """The sizes of a base's encoders; FLUX.1's for those whose files are not on this machine. Nothing is downloaded."""
    found = FLUX_ENCODERS
    for key, read in (("t5xxl", _t5), ("clip_l", _clip), ("ae", _vae)):
        try:
            reader, config = base.headers(key)
            found = replace(found, **read(reader, config))
        except (ModelError, OSError, KeyError):
            continue  # whoever loads the part says what is wrong with it; a forecast is no place to fail
    return found


def _count(reader: Reader, names: Iterable[str]) -> int:
    return sum(prod(reader.shapes[name]) for name in names)


def _t5(reader: Reader, config: dict) -> dict[str, int]:
    embeddings = [name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in reader.shapes]
    layers = range(config["num_layers"])
    inside = [name for name in reader.shapes if name.startswith("encoder.block.")]
    each = [_count(reader, (name for name in inside if name.startswith(f"encoder.block.{i}."))) for i in layers]
    return {
        "t5": _count(reader, reader.shapes) - _count(reader, embeddings[1:]),  # the same embedding under two names
        "t5_layer": max(each),
        "t5_width": config["d_model"],
        "t5_inner": config["d_ff"],
        "t5_heads": config["num_heads"],
        "t5_layers": config["num_layers"],
    }


def _clip(reader: Reader, config: dict) -> dict[str, int]:
    return {
        "clip": _count(reader, (name for name in reader.shapes if not name.endswith("position_ids"))),
        "clip_width": config["hidden_size"],
        "clip_layers": config["num_hidden_layers"],
    }


def _vae(reader: Reader, config: dict) -> dict[str, int]:
    halves = {half: [name for name in reader.shapes if name.startswith(half)] for half in ("encoder.", "decoder.")}
    return {
        "vae_encoder": _count(reader, halves["encoder."]),
        "vae_decoder": _count(reader, halves["decoder."]),
        "vae_width": config["block_out_channels"][0],
    }
