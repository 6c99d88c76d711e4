"""Toy checkpoints as users have them: how they are written, and how the tests open them."""

import torch
from safetensors.torch import save_file

from library.config.tables.model import ModelTable
from library.models.base import Base
from library.models.checkpoint_file import TransformerFile
from library.models.load import load_transformer

SHAPE = {"heads": 2, "head_dim": 128, "double": 1, "single": 1, "axes": (16, 56, 56), "pooled": 128}
PREFIX = "model.diffusion_model."


def weights(path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return load_transformer(TransformerFile.open(path), dtype=dtype).state_dict()


def same(loaded: dict, expected: dict) -> bool:
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[n], expected[n]) for n in expected)


def scaled(tensors: dict, prefix: str, leaf: str, per_row: bool) -> tuple[dict, dict]:
    """A scaled fp8 file of these tensors as ComfyUI writes them, and the weights it stands for."""
    stored, truth = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            scale = (tensor.abs().amax(1) if per_row else tensor.abs().max()) / 448
            value = (tensor / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            stored[prefix + name] = value
            stored[prefix + name.removesuffix("weight") + leaf] = scale
            truth[name] = value.float() * (scale[:, None] if per_row else scale)
        else:
            stored[prefix + name] = truth[name] = tensor
    return stored, truth


def bfl_vae_name(name: str, levels: int) -> str:
    """diffusers' name of a VAE tensor -> the one in ae.safetensors."""
    side, _, rest = name.partition(".")
    if rest.startswith("mid_block.attentions.0."):
        leaf = rest.removeprefix("mid_block.attentions.0.")
        for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            leaf = leaf.replace(new, old)
        return f"{side}.mid.attn_1.{leaf}"
    if rest.startswith("mid_block.resnets."):
        index, _, leaf = rest.removeprefix("mid_block.resnets.").partition(".")
        return f"{side}.mid.block_{int(index) + 1}.{leaf}"
    for kind in ("down", "up"):
        if rest.startswith(f"{kind}_blocks."):
            level, _, leaf = rest.removeprefix(f"{kind}_blocks.").partition(".")
            level = int(level) if kind == "down" else levels - 1 - int(level)
            leaf = leaf.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
            return f"{side}.{kind}.{level}." + leaf.replace(f"{kind}samplers.0", f"{kind}sample")
    return name.replace("conv_norm_out", "norm_out")


def from_files(files, folder, **other) -> Base:
    keys = {
        "pretrained_model_name_or_path": str(files / "flux1-fill-dev.safetensors"), "ae": files / "ae.safetensors",
        "clip_l": files / "clip_l.safetensors", "t5xxl": files / "t5xxl_fp16.safetensors",
        "clip_tokenizer": folder / "tokenizer", "t5_tokenizer": folder / "tokenizer_2",
    }  # fmt: skip
    return Base.open(ModelTable(**{**keys, **other}))


def t5_file(tensors: dict, kind: str, path) -> None:
    """These tensors as the T5 files that there are."""
    if kind == "scaled fp8":
        stored, _ = scaled(tensors, "", "scale_weight", False)
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
        return
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[kind]
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
