"""Every checkpoint layout of the same weights gives the same model, and diffusers agrees about the names."""

import inspect
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from library.config.tables.model import ModelTable
from library.errors import ModelError
from library.models.base import Base
from library.models.checkpoint_file import TransformerFile
from library.models.load import load_transformer
from tests.tiny import T5_LENGTH, tiny_base, tiny_transformer

SHAPE = {"heads": 2, "head_dim": 128, "double": 1, "single": 1, "axes": (16, 56, 56), "pooled": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"), **SHAPE)


@pytest.fixture(scope="module")
def original(folder) -> dict[str, torch.Tensor]:
    """The transformer's tensors under BFL's names."""
    file = TransformerFile.open(folder / "transformer")
    return {entry.name: file.read(entry).clone() for entry in file.entries}


def weights(path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return load_transformer(TransformerFile.open(path), dtype=dtype).state_dict()


def same(loaded: dict, expected: dict) -> bool:
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[n], expected[n]) for n in expected)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
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


@pytest.mark.parametrize(
    ("leaf", "per_row"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
def test_scaled_fp8(original, tmp_path, leaf, per_row) -> None:
    stored, truth = scaled(original, "model.diffusion_model.", leaf, per_row)
    stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
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
    ],
)
def test_scales_that_are_not_understood_are_refused(original, tmp_path, name, value, message) -> None:
    save_file({**original, name: value}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=message):
        weights(tmp_path / "odd.safetensors")


def write_gguf(path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_q8(original, tmp_path) -> None:
    write_gguf(tmp_path / "fill.gguf", original, "Q8_0")
    loaded = weights(tmp_path / "fill.gguf")
    for name, tensor in original.items():
        if tensor.ndim == 1:
            assert torch.equal(loaded[name], tensor)
            continue
        # Q8_0: blocks of 32 values, an fp16 scale each.
        blocks = tensor.view(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        expected = (blocks / scale).round() * scale.half().float()
        assert torch.allclose(loaded[name], expected.view(tensor.shape), atol=float(scale.max()) * 1.01), name
        assert (loaded[name] - tensor).norm() / tensor.norm() < 0.01


def k_blocks(count: int, five_bits: bool) -> np.ndarray:
    """Random well-formed Q4_K or Q5_K blocks."""
    random = np.random.default_rng(0)
    scales = random.uniform(0.001, 0.01, (count, 2)).astype(np.float16).view(np.uint8)
    rest = random.integers(0, 256, (count, 12 + (32 if five_bits else 0) + 128), dtype=np.uint8)
    return np.concatenate([scales, rest], axis=1)


def decode_k(block: np.ndarray, five_bits: bool) -> list[float]:
    """One block by ggml's definition: value = d * scale_j * q - dmin * min_j for each sub-block j of 32."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    packed, values = block[4:16].astype(int), []
    high, low = (block[16:48], block[48:]) if five_bits else (None, block[16:])
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        for i in range(32):
            q = (int(low[32 * (j // 2) + i]) >> (4 * (j % 2))) & 15
            if five_bits:
                q |= ((int(high[i]) >> j) & 1) << 4
            values.append(d * scale * q - dmin * minimum)
    return values


@pytest.mark.parametrize(("kind", "five_bits"), [("Q4_K", False), ("Q5_K", True)])
def test_gguf_k_quants(original, tmp_path, kind, five_bits) -> None:
    import gguf

    name = "single_blocks.0.linear1.weight"
    rows, width = original[name].shape
    blocks = k_blocks(rows * width // 256, five_bits)
    writer = gguf.GGUFWriter(tmp_path / "fill.gguf", "flux")
    for other, tensor in original.items():
        if other == name:
            data = blocks.reshape(rows, -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(other, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = weights(tmp_path / "fill.gguf")[name].view(-1, 256)
    for index in (0, 7, len(blocks) - 1):
        assert loaded[index].tolist() == pytest.approx(decode_k(blocks[index], five_bits), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("file", "content"), [("fill.gguf", b"GGUF"), ("fill.safetensors", b"x"), ("fill.ckpt", b"x")])
def test_broken_files_are_a_plain_message(tmp_path, file, content) -> None:
    from library.errors import UserError

    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        TransformerFile.open(tmp_path / file)


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


@pytest.fixture(scope="module")
def files(folder, original, tmp_path_factory):
    """The base as a ComfyUI user has it: four single files."""
    from safetensors.torch import load_file

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


def from_files(files, folder, **other) -> Base:
    keys = {
        "pretrained_model_name_or_path": str(files / "flux1-fill-dev.safetensors"), "ae": files / "ae.safetensors",
        "clip_l": files / "clip_l.safetensors", "t5xxl": files / "t5xxl_fp16.safetensors",
        "clip_tokenizer": folder / "tokenizer", "t5_tokenizer": folder / "tokenizer_2",
    }  # fmt: skip
    return Base.open(ModelTable(**{**keys, **other}))


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
    import shutil

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
    from safetensors.torch import load_file

    stored, truth = scaled(load_file(files / "t5xxl_fp16.safetensors"), "", "scale_weight", False)
    save_file({**stored, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, tmp_path / "t5.safetensors")
    save_file(truth, tmp_path / "truth.safetensors")
    embeddings = []
    for name in ("t5", "truth"):
        encoders = from_files(files, folder, t5xxl=tmp_path / f"{name}.safetensors").load_text_encoders()
        embeddings.append(encoders.encode(["a red circle"], T5_LENGTH).embeddings.t5)
    assert torch.equal(*embeddings)


def test_t5_layer_by_layer_is_the_same(folder) -> None:
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    captions = [f"a red circle {'lime ' * i}" for i in range(11)]
    whole = base.load_text_encoders().encode(captions, T5_LENGTH)
    layered = base.load_text_encoders(layerwise=True)
    crossings = []
    for block in layered.t5.encoder.block:
        block.register_forward_pre_hook(lambda module, args: crossings.append(module))
    result = layered.encode(captions, T5_LENGTH)
    assert torch.allclose(result.embeddings.t5, whole.embeddings.t5, atol=1e-5)
    assert len(crossings) == len(layered.t5.encoder.block)


@pytest.mark.parametrize("missing", ["ae", "clip_l", "t5xxl"])
def test_a_single_transformer_needs_its_companions(files, folder, missing) -> None:
    base = from_files(files, folder, **{missing: None})
    with pytest.raises(ModelError, match=missing):
        base.load_vae() if missing == "ae" else base.load_text_encoders()


def test_toy_text_encoders_have_no_built_in_tokenizer(files, folder) -> None:
    with pytest.raises(ModelError, match="clip_tokenizer"):
        from_files(files, folder, clip_tokenizer=None).load_text_encoders()


@pytest.mark.parametrize(
    ("channels", "message"), [(64, "FLUX.1 dev"), (448, r"ACE\+\+"), (200, "no FLUX.1 model known")]
)
def test_other_models_are_named_by_their_input_width(original, tmp_path, channels, message) -> None:
    save_file({**original, "img_in.weight": torch.zeros(256, channels)}, tmp_path / "other.safetensors")
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
