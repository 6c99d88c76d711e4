"""A toy base in diffusers' layout, its transformer under BFL's names, and the single files of a ComfyUI user."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.checkpoint_file import TransformerFile
from tests.models.layout_files import SHAPE, bfl_vae_name
from tests.tiny import tiny_base


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"), **SHAPE)


@pytest.fixture(scope="session")
def original(folder) -> dict[str, torch.Tensor]:
    """The transformer's tensors under BFL's names."""
    file = TransformerFile.open(folder / "transformer")
    return {entry.name: file.read(entry).clone() for entry in file.entries}


@pytest.fixture(scope="session")
def files(folder, original, tmp_path_factory):
    """The base as a ComfyUI user has it: four single files."""

    place = tmp_path_factory.mktemp("files")
    save_file(original, place / "flux1-fill-dev.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    ae = {}
    for name, tensor in vae.items():
        is_attention = ".attentions." in name and tensor.ndim == 2
        ae[bfl_vae_name(name, 4)] = (tensor[:, :, None, None] if is_attention else tensor).clone()
    save_file(ae, place / "ae.safetensors")
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    save_file({f"text_model.{name}": tensor for name, tensor in clip.items()}, place / "clip_l.safetensors")
    t5 = load_file(folder / "text_encoder_2" / "model.safetensors")
    save_file(t5, place / "t5xxl_fp16.safetensors")
    return place
