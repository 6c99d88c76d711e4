"""Every checkpoint layout of the same weights gives the same transformer, and diffusers agrees about the names."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from library.config.tables.model import ModelTable
from library.errors import ModelError
from library.models.base import Base
from library.models.checkpoint_file import TransformerFile
from tests.models.layout_files import SHAPE, same, scaled, weights
from tests.tiny import tiny_transformer


def test_bfl_names_are_those_that_diffusers_converts(original) -> None:
    from diffusers.loaders import single_file_utils

    # diffusers' converter is written for a width of 3072; nothing else in it depends on the size.
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 256"), scope)
    converted = scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(original))
    theirs = tiny_transformer(**{k: v for k, v in SHAPE.items()}).state_dict()
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_single_files(original, tmp_path, prefix, dtype) -> None:
    save_file({prefix + name: tensor.to(dtype) for name, tensor in original.items()}, tmp_path / "fill.safetensors")
    expected = {name: tensor.to(dtype).float() for name, tensor in original.items()}
    assert same(weights(tmp_path / "fill.safetensors"), expected)


def test_a_single_file_with_diffusers_names(folder, tmp_path) -> None:
    source = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "fill.safetensors").write_bytes(source.read_bytes())
    assert same(weights(tmp_path / "fill.safetensors"), weights(folder / "transformer"))


def test_an_all_in_one_file(original, tmp_path) -> None:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    tensors |= {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "all.safetensors")
    assert same(weights(tmp_path / "all.safetensors"), original)
    save_file({**tensors, "other.x": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match="other.x"):
        weights(tmp_path / "more.safetensors")


@pytest.mark.parametrize(
    ("leaf", "per_row"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
@pytest.mark.parametrize("marker", [0, 1, 2])
def test_scaled_fp8(original, tmp_path, leaf, per_row, marker) -> None:
    stored, truth = scaled(original, "model.diffusion_model.", leaf, per_row)
    stored["model.diffusion_model.scaled_fp8"] = torch.zeros(marker, dtype=torch.float8_e4m3fn)
    stored["model.diffusion_model.single_blocks.0.linear1.scale_input"] = torch.ones(())
    save_file(stored, tmp_path / "scaled.safetensors")
    assert same(weights(tmp_path / "scaled.safetensors"), truth)


def test_comfys_description_of_a_format_is_read(original, tmp_path) -> None:
    def describe(kind: str) -> dict:
        stored, _ = scaled(original, "", "weight_scale", False)
        text = json.dumps({"format": kind}).encode()
        return {**stored, "img_in.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}

    save_file(describe("float8_e4m3fn"), tmp_path / "known.safetensors")
    assert weights(tmp_path / "known.safetensors")
    save_file(describe("nvfp4"), tmp_path / "unknown.safetensors")
    with pytest.raises(ModelError, match="nvfp4"):
        weights(tmp_path / "unknown.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("img_in.scale_somehow", torch.ones(()), "does not know how to apply"),
        ("img_in.scale_weight", torch.ones(()), "not fp8"),
        ("nowhere.scale_weight", torch.ones(()), "belong to no weight"),
        ("single_blocks.0.linear1.weight_scale", torch.ones(2, 4), "one scale per weight or row"),
    ],
)
def test_scales_that_are_not_understood_are_refused(original, tmp_path, name, value, message) -> None:
    tensors = {**original, name: value}
    if value.numel() > 1:
        tensors["single_blocks.0.linear1.weight"] = original["single_blocks.0.linear1.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=message):
        weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(("file", "content"), [("fill.gguf", b"GGUF"), ("fill.safetensors", b"x"), ("fill.ckpt", b"x")])
def test_broken_files_are_a_plain_message(tmp_path, file, content) -> None:
    from library.errors import UserError

    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        TransformerFile.open(tmp_path / file)


@pytest.mark.parametrize(
    ("channels", "message"), [(64, "FLUX.1 dev"), (448, r"ACE\+\+"), (200, "no FLUX.1 model known")]
)
def test_other_models_are_named_by_their_input_width(original, tmp_path, channels, message) -> None:
    # with a tensor of its own as well: what the file is says more than that it is unknown
    own = {"img_in.weight": torch.zeros(256, channels), "extra.weight": torch.zeros(1)}
    save_file({**original, **own}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=message):
        _ = Base.open(ModelTable(pretrained_model_name_or_path=str(tmp_path / "other.safetensors"))).shape


def test_a_lora_is_no_transformer(tmp_path) -> None:
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="x.safetensors"):
        TransformerFile.open(tmp_path / "x.safetensors")


def test_a_hub_id_fetches_only_the_components_it_needs(folder, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def download(repository, **options):
        asked.append((repository, options["revision"], options["allow_patterns"], options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    base = Base.open(ModelTable(pretrained_model_name_or_path="someone/Fill", revision="abc", local_files_only=True))
    assert base.shape.hidden == 256
    (repository, revision, patterns, offline), *more = asked
    assert (repository, revision, offline, more) == ("someone/Fill", "abc", True, [])
    assert all(pattern.startswith("transformer/") for pattern in patterns)


def test_a_hub_that_cannot_be_reached_is_a_plain_message() -> None:
    base = Base.open(ModelTable(pretrained_model_name_or_path="someone/absent", local_files_only=True))
    with pytest.raises(ModelError, match="cannot get transformer of someone/absent"):
        _ = base.shape
