"""Which linears of CLIP-L `train_text_encoder` puts a LoRA on, with which rank and alpha. Needs no torch."""

from __future__ import annotations

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.networks.arguments import Settings
from library.networks.targets import Inherited, Target

SUFFIXES = ("q_proj", "k_proj", "v_proj", "out_proj")


def is_attention(name: str) -> bool:
    """Whether a module of CLIP-L is one of its attention's linears, as `encoder.layers.0.self_attn.q_proj`."""
    return name.endswith(SUFFIXES) and ".self_attn." in name


def text_targets(
    table: NetworkTable, settings: Settings, linears: dict[str, tuple[int, int]], inherited: Inherited
) -> tuple[Target, ...]:
    """A target for each attention linear of CLIP-L, whose linears have these (out, in) sizes; none without the key.

    Raises ConfigError if CLIP-L has no such linears.
    """
    if not table.train_text_encoder:
        return ()
    found = []
    for name, (out_features, in_features) in linears.items():
        if not is_attention(name):
            continue
        rank = inherited.ranks.get(name, table.text_encoder_dim or table.network_dim)
        scale = inherited.scales.get(name)
        alpha = float(rank) if table.network_alpha is None else table.network_alpha
        if scale is not None:
            alpha = settings.alpha_of(rank, scale)
        found.append(Target(name, out_features, in_features, (((0, out_features),),), rank, alpha))
    if not found:
        raise ConfigError("train_text_encoder: this base's CLIP-L has no attention layers to train")
    return tuple(found)
