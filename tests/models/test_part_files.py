"""VAE and text encoders in the files that ComfyUI users have, and T5 layer by layer: all the same parts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.tables.model import ModelTable
from library.errors import ModelError
from library.models.base import Base
from tests.models.layout_files import from_files, same, scaled, t5_file
from tests.tiny import T5_LENGTH


def test_single_files_are_the_folder(folder, files) -> None:
    whole = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    single = from_files(files, folder)
    assert single.shape == whole.shape
    assert same(single.load_transformer().state_dict(), whole.load_transformer().state_dict())
    assert same(single.load_vae().model.state_dict(), whole.load_vae().model.state_dict())
    captions = ["a red circle", "zebra"]
    ours, theirs = (base.load_text_encoders().encode(captions, T5_LENGTH) for base in (single, whole))
    assert torch.equal(ours.embeddings.t5, theirs.embeddings.t5)
    assert torch.equal(ours.embeddings.pooled, theirs.embeddings.pooled)
    assert single.scheduler_config["max_shift"] == 1.15 and single.defaults.t5xxl_max_token_length == 512
    assert len(single.files("text_encoders")) == 6 and len(single.files("vae")) == 1


def test_a_renamed_file_is_the_same_encoder(folder, files, tmp_path) -> None:
    """A cache made with ae.safetensors is not stale because the file is called vae.safetensors now."""
    named = {"ae": "vae.safetensors", "clip_l": "a.safetensors", "t5xxl": "0.safetensors"}
    whole = from_files(files, folder)
    for key, name in named.items():
        shutil.copy(getattr(whole.table, key), tmp_path / name)
    renamed = from_files(files, folder, **{key: tmp_path / name for key, name in named.items()})
    for part in ("vae", "text_encoders"):
        assert renamed.identity(part) == whole.identity(part)
    with open(tmp_path / "vae.safetensors", "ab") as file:
        file.write(b" ")
    assert renamed.identity("vae") != whole.identity("vae")


def test_scaled_fp8_text_encoders(folder, files, tmp_path) -> None:

    stored, truth = scaled(load_file(files / "t5xxl_fp16.safetensors"), "", "scale_weight", False)
    save_file({**stored, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, tmp_path / "t5.safetensors")
    save_file(truth, tmp_path / "truth.safetensors")
    embeddings = []
    for name in ("t5", "truth"):
        encoders = from_files(files, folder, t5xxl=tmp_path / f"{name}.safetensors").load_text_encoders()
        embeddings.append(encoders.encode(["a red circle"], T5_LENGTH).embeddings.t5)
    assert torch.equal(*embeddings)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp8", "scaled fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_layer_by_layer_is_the_same_to_the_bit(files, folder, tmp_path, kind, dtype) -> None:

    t5_file(load_file(files / "t5xxl_fp16.safetensors"), kind, tmp_path / "t5.safetensors")
    base = from_files(files, folder, t5xxl=tmp_path / "t5.safetensors")
    captions = [f"a red circle {'lime ' * i}" for i in range(8)]
    whole = base.load_text_encoders(dtype=dtype).encode(captions, T5_LENGTH)
    layered = base.load_text_encoders(dtype=dtype, layerwise=True).encode(captions, T5_LENGTH)
    assert layered.embeddings.t5.dtype == dtype
    assert torch.equal(layered.embeddings.t5, whole.embeddings.t5)
    assert torch.equal(layered.embeddings.pooled, whole.embeddings.pooled)


def test_t5_layer_by_layer_takes_any_number_of_captions_through_each_layer_once(folder) -> None:
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    captions = [f"a red circle {'lime ' * i}" for i in range(11)]
    whole = base.load_text_encoders().encode(captions, T5_LENGTH)
    layered = base.load_text_encoders(layerwise=True)
    crossings = []
    for block in layered.t5.encoder.block:
        block.register_forward_pre_hook(lambda module, args: crossings.append(module))
        assert all(parameter.is_meta for parameter in block.parameters())
    result = layered.encode(captions, T5_LENGTH)
    assert torch.allclose(result.embeddings.t5, whole.embeddings.t5, atol=1e-5)
    assert len(crossings) == len(layered.t5.encoder.block)
    assert torch.equal(layered.encode(captions, T5_LENGTH).embeddings.t5, result.embeddings.t5)


def test_a_layerwise_t5_with_a_missing_tensor_is_refused(files, folder, tmp_path) -> None:

    tensors = load_file(files / "t5xxl_fp16.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, tmp_path / "t5.safetensors")
    base = from_files(files, folder, t5xxl=tmp_path / "t5.safetensors")
    with pytest.raises(ModelError, match=r"missing encoder.block.1.layer.1.DenseReluDense.wo.weight"):
        base.load_text_encoders(layerwise=True)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_l_files(files, folder, tmp_path, prefix) -> None:
    """With and without the prefix, and with all that files carry beside the text encoder."""

    plain = {n.removeprefix("text_model."): t for n, t in load_file(files / "clip_l.safetensors").items()}
    width = plain["embeddings.token_embedding.weight"].shape[1]
    extras = {
        "logit_scale": torch.zeros(()), "text_projection.weight": torch.zeros(width, width),
        f"{prefix}embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.class_embedding": torch.zeros(3), "visual_projection.weight": torch.zeros(2, 3),
    }  # fmt: skip
    save_file({**{prefix + n: t for n, t in plain.items()}, **extras}, tmp_path / "clip_l.safetensors")
    expected = from_files(files, folder).load_text_encoders().clip.state_dict()
    found = from_files(files, folder, clip_l=tmp_path / "clip_l.safetensors").load_text_encoders()
    assert same(found.clip.state_dict(), expected)
    save_file({**{prefix + n: t for n, t in plain.items()}, "other.x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"other\.x"):
        from_files(files, folder, clip_l=tmp_path / "odd.safetensors").load_text_encoders()


def test_everything_from_an_all_in_one_file(files, folder, original, tmp_path) -> None:

    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in load_file(files / "ae.safetensors").items()}
    for part, file in (("clip_l", "clip_l"), ("t5xxl", "t5xxl_fp16")):
        tensors |= {
            f"text_encoders.{part}.transformer.{n}": t for n, t in load_file(files / f"{file}.safetensors").items()
        }
        tensors[f"text_encoders.{part}.logit_scale"] = torch.zeros(())
    save_file(tensors, tmp_path / "all.safetensors")
    base = from_files(
        files, folder, pretrained_model_name_or_path=str(tmp_path / "all.safetensors"), ae=None, clip_l=None, t5xxl=None
    )
    apart = from_files(files, folder)
    assert same(base.load_transformer().state_dict(), apart.load_transformer().state_dict())
    assert same(base.load_vae().model.state_dict(), apart.load_vae().model.state_dict())
    ours, theirs = (one.load_text_encoders() for one in (base, apart))
    assert same(ours.clip.state_dict(), theirs.clip.state_dict())
    assert same(ours.t5.state_dict(), theirs.t5.state_dict())
    layered = base.load_text_encoders(layerwise=True).encode(["a red circle"], T5_LENGTH)
    assert torch.equal(layered.embeddings.t5, theirs.encode(["a red circle"], T5_LENGTH).embeddings.t5)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_sharded_t5_folder(folder, tmp_path, variant) -> None:
    """As FLUX.1's own repository has it, with and without a variant."""
    import shutil

    from transformers import T5EncoderModel

    shutil.copytree(folder, tmp_path / "base")
    place = tmp_path / "base" / "text_encoder_2"
    model = T5EncoderModel.from_pretrained(place)
    shutil.rmtree(place)
    model.save_pretrained(place, max_shard_size="20KB", variant=variant)
    assert len(list(place.glob("*.safetensors"))) > 1
    whole = Base.open(ModelTable(pretrained_model_name_or_path=str(folder))).load_text_encoders()
    table = ModelTable(pretrained_model_name_or_path=str(tmp_path / "base"), variant=variant)
    for layerwise in (False, True):
        sharded = Base.open(table).load_text_encoders(layerwise=layerwise)
        found, expected = (one.encode(["a red circle"], T5_LENGTH).embeddings.t5 for one in (sharded, whole))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("missing", ["ae", "clip_l", "t5xxl"])
def test_a_single_transformer_needs_its_companions(files, folder, missing) -> None:
    base = from_files(files, folder, **{missing: None})
    with pytest.raises(ModelError, match=missing):
        base.load_vae() if missing == "ae" else base.load_text_encoders()


def test_toy_text_encoders_have_no_built_in_tokenizer(files, folder) -> None:
    with pytest.raises(ModelError, match="clip_tokenizer"):
        from_files(files, folder, clip_tokenizer=None).load_text_encoders()


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_built_in_tokenizers(kind) -> None:
    from library.models.text import BUILT_IN, built_in_tokenizer, load_tokenizer

    rows = BUILT_IN[kind][1]
    tokenizer = load_tokenizer(built_in_tokenizer(kind, rows), kind, rows)
    assert len(tokenizer) == {"clip": 49408, "t5": 32100}[kind]
    golden = {
        "clip": [49406, 320, 1125, 539, 320, 2368, 49407],
        "t5": [3, 9, 1202, 13, 3, 9, 1712, 1],
    }
    assert tokenizer("a photo of a cat").input_ids == golden[kind]


def test_a_real_vocabulary_with_other_ids_is_refused(tmp_path) -> None:
    import shutil

    from library.models.text import BUILT_IN, load_tokenizer

    shutil.copytree(BUILT_IN["t5"][0], tmp_path / "t5")
    content = json.loads((tmp_path / "t5" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    places = {piece: i for i, (piece, _) in enumerate(vocabulary) if piece in ("▁red", "▁blue", "▁circle", "▁one")}
    assert len(places) >= 2
    first, second = list(places.values())[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "t5" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="does not give FLUX.1's token ids"):
        load_tokenizer(tmp_path / "t5", "t5", 32128)


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.03), ("fp8", 0.1)])
def test_t5_in_a_small_precision_is_close(folder, precision, error) -> None:
    from library.memory.linear import Linear

    base = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    exact = base.load_text_encoders().encode(["a red circle"], T5_LENGTH).embeddings
    encoders = base.load_text_encoders(t5_precision=precision)
    close = encoders.encode(["a red circle"], T5_LENGTH).embeddings
    assert 0 < (close.t5 - exact.t5).norm() / exact.t5.norm() < error
    assert torch.equal(close.pooled, exact.pooled)
    stored = [module for module in encoders.t5.modules() if isinstance(module, Linear)]
    assert len(stored) == 2 * 7 and all(linear.storage is not None for linear in stored)
    layered = base.load_text_encoders(t5_precision=precision, layerwise=True).encode(["a red circle"], T5_LENGTH)
    assert torch.allclose(layered.embeddings.t5, close.t5, atol=1e-5)
