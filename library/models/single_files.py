"""The single files that ComfyUI users have: ae.safetensors, clip_l.safetensors, t5xxl_*.safetensors.

They carry no configuration, so it is read off the tensors' shapes.
"""

from __future__ import annotations

from pathlib import Path

from library.errors import ModelError
from library.models.checkpoint_file import single_file
from library.models.readers import Reader, Renamed

VAE_PREFIXES = ("", "vae.", "first_stage_model.")
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159
CLIP_HEAD = 64


def component_file(kind: str, path: Path) -> tuple[Reader, dict]:
    """Reader (under the library's names) and configuration of a single file; kind: 'ae', 'clip_l' or 't5xxl'."""
    reader = single_file(path)
    return {"ae": _vae, "clip_l": _clip, "t5xxl": _t5}[kind](reader)


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
    shapes = {name.removeprefix("text_model."): shape for name, shape in reader.shapes.items()}
    if "embeddings.token_embedding.weight" not in shapes:
        raise ModelError(f"{reader.source} is no CLIP text encoder: it has no embeddings.token_embedding.weight")
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
    shapes = reader.shapes
    first = "encoder.block.0.layer.0.SelfAttention"
    if f"{first}.q.weight" not in shapes or f"{first}.relative_attention_bias.weight" not in shapes:
        raise ModelError(f"{reader.source} is no T5 encoder: it has no {first}.q.weight")
    buckets, heads = shapes[f"{first}.relative_attention_bias.weight"]
    inner, width = shapes[f"{first}.q.weight"]
    embedding = next(shapes[n] for n in ("shared.weight", "encoder.embed_tokens.weight") if n in shapes)
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
