"""The single files that ComfyUI users have: ae.safetensors, clip_l.safetensors, t5xxl_*.safetensors.

They carry no configuration, so it is read off the tensors' shapes.
"""

from __future__ import annotations

from pathlib import Path

from library.errors import ModelError
from library.models.checkpoint_file import LISTED, OTHER_MODELS, single_file
from library.models.keymap import PREFIXES
from library.models.readers import Reader, Renamed

ALL_IN_ONE = {
    "ae": ("vae.", "first_stage_model."), "clip_l": ("text_encoders.clip_l.",), "t5xxl": ("text_encoders.t5xxl.",),
}  # fmt: skip
VAE_PREFIXES = ("", "vae.", "first_stage_model.")
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159
CLIP_HEAD = 64
CLIP_EXTRAS = ("logit_scale", "text_projection", "vision_model.", "visual_projection.", "embeddings.position_ids")
"""What whole CLIP models have beside the text encoder's own tensors: all of it for comparing with pictures."""
T5_EXTRAS = ("logit_scale", "spiece_model")
GGUF_EMBEDDING, GGUF_OUTPUT = "token_embd.weight", "output.weight"
GGUF_T5 = {
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm", "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}  # fmt: skip
"""llama.cpp's names inside a block of T5, in which text encoders as GGUF come."""


def component_file(kind: str, path: Path) -> tuple[Reader, dict]:
    """Reader (under the library's names) and configuration of a single file; kind: 'ae', 'clip_l' or 't5xxl'."""
    reader = single_file(path)
    return {"ae": _vae, "clip_l": _clip, "t5xxl": _t5}[kind](reader)


def holds(path: Path, kind: str) -> bool:
    """Whether an all-in-one file has this part beside its transformer."""
    return any(name.startswith(ALL_IN_ONE[kind]) for name in single_file(path).shapes)


def _part(reader: Reader, kind: str, marker: str, extras: tuple[str, ...]) -> Reader:
    """One model's tensors of a file that may hold others: those with the prefix that `marker` has there.

    extras: beginnings of names that belong to the model, but that nothing here needs.
    """
    prefixes = [name.removesuffix(marker) for name in reader.shapes if name.endswith(marker)]
    if len(prefixes) != 1:
        raise ModelError(f"{reader.source} is no {kind}: it has {len(prefixes)} tensors named {marker} instead of one")
    prefix = prefixes[0]
    names = {name[len(prefix) :]: name for name in reader.shapes if name.startswith(prefix)}
    outside = [name for name in reader.shapes if not name.startswith((prefix, *PREFIXES[:-1], *OTHER_MODELS, *extras))]
    if outside:
        raise ModelError(f"{reader.source}: {', '.join(outside[:LISTED])} belong to no model that InFlux knows")
    return Renamed(reader, {new: old for new, old in names.items() if not new.startswith(extras)})


def _t5_name(name: str) -> str:
    """llama.cpp's name of a T5 tensor -> transformers'."""
    if name == GGUF_EMBEDDING:
        return "shared.weight"
    parts = name.split(".")
    if parts[:2] == ["enc", "blk"] and parts[3] in GGUF_T5:
        return f"encoder.block.{parts[2]}.{GGUF_T5[parts[3]]}.{'.'.join(parts[4:])}"
    return name.replace("enc.output_norm", "encoder.final_layer_norm")


def _vae(reader: Reader) -> tuple[Reader, dict]:
    prefix = next((p for p in VAE_PREFIXES if f"{p}encoder.conv_in.weight" in reader.shapes), None)
    if prefix is None:
        raise ModelError(f"{reader.source} is no VAE: it has no encoder.conv_in.weight")
    if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in reader.shapes:
        names = {name[len(prefix) :]: name for name in reader.shapes if name.startswith(prefix)}
    else:
        names = {_vae_name(name[len(prefix) :], reader): name for name in reader.shapes if name.startswith(prefix)}
    shapes = {
        new: reader.shapes[old][:2]
        for new, old in names.items()
        if ".attentions." in new and len(reader.shapes[old]) == 4
    }
    renamed = Renamed(reader, names, shapes)
    return renamed, _vae_config(renamed)


def _vae_name(name: str, reader: Reader) -> str:
    """BFL's name of a VAE tensor -> diffusers'."""
    parts = name.split(".")
    if parts[1] == "mid":
        inside = parts[3:]
        if parts[2].startswith("attn"):
            return f"{parts[0]}.mid_block.attentions.0.{ATTENTION[inside[0]]}.{inside[1]}"
        return f"{parts[0]}.mid_block.resnets.{int(parts[2][-1]) - 1}.{'.'.join(inside)}"
    if parts[1] in ("down", "up"):
        level = int(parts[2])
        if parts[1] == "up":
            level = _levels(reader, "decoder.up.") - 1 - level
        if parts[3] == "block":
            inside = ".".join(parts[5:]).replace("nin_shortcut", "conv_shortcut")
            return f"{parts[0]}.{parts[1]}_blocks.{level}.resnets.{parts[4]}.{inside}"
        return f"{parts[0]}.{parts[1]}_blocks.{level}.{parts[3]}rs.0.{'.'.join(parts[4:])}"
    return name.replace("norm_out", "conv_norm_out")


def _levels(reader: Reader, marker: str) -> int:
    return 1 + max(int(name.split(marker)[1].split(".")[0]) for name in reader.shapes if marker in name)


def _vae_config(reader: Reader) -> dict:
    shapes = reader.shapes
    levels = _levels(reader, "encoder.down_blocks.")
    channels = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    layers = sum(name.startswith("encoder.down_blocks.0.resnets.") and name.endswith("conv1.weight") for name in shapes)
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32 if all(width % 32 == 0 for width in channels) else 4,
        "scaling_factor": FLUX_SCALING,
        "shift_factor": FLUX_SHIFT,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(reader: Reader) -> tuple[Reader, dict]:
    reader = _part(reader, "CLIP text encoder", "embeddings.token_embedding.weight", CLIP_EXTRAS)
    shapes = reader.shapes
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return reader, {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _levels(reader, "encoder.layers."),
        "num_attention_heads": max(1, width // CLIP_HEAD),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _t5(reader: Reader) -> tuple[Reader, dict]:
    first = "encoder.block.0.layer.0.SelfAttention"
    if GGUF_EMBEDDING in reader.shapes:
        reader = Renamed(reader, {_t5_name(name): name for name in reader.shapes if name != GGUF_OUTPUT})
    reader = _part(reader, "T5 encoder", f"{first}.relative_attention_bias.weight", T5_EXTRAS)
    shapes = reader.shapes
    buckets, heads = shapes[f"{first}.relative_attention_bias.weight"]
    inner, width = shapes[f"{first}.q.weight"]
    embedding = next((shapes[n] for n in ("shared.weight", "encoder.embed_tokens.weight") if n in shapes), None)
    if embedding is None or f"{first}.q.weight" not in shapes:
        raise ModelError(f"{reader.source} is no whole T5 encoder: it lacks shared.weight or {first}.q.weight")
    return reader, {
        "vocab_size": embedding[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _levels(reader, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
