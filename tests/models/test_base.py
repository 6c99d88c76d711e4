"""A base in FLUX.1-Fill-dev's folder layout: parts, defaults, text encoders and VAE equal to the pipeline's own."""

import json
import shutil
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.conditioning.item import Condition
from library.config.tables.model import ModelTable
from library.errors import ModelError
from library.flow.packing import image_ids, pack_latents, pack_mask, unpack_latents
from library.models.base import Base
from library.models.predict import predict
from tests.tiny import T5_LENGTH, tiny_base

CAPTIONS = ["make it a red circle on blue", "", "zebra " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "base")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import FluxFillPipeline

    return FluxFillPipeline.from_pretrained(folder)


def base(folder, **keys) -> Base:
    return Base.open(ModelTable(pretrained_model_name_or_path=str(folder), **keys))


def test_text_embeddings_are_the_pipelines(folder, pipeline) -> None:
    encoders = base(folder).load_text_encoders()
    encoded = encoders.encode(CAPTIONS, T5_LENGTH)
    with torch.no_grad():
        t5, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, max_sequence_length=T5_LENGTH)
    assert torch.allclose(encoded.embeddings.t5, t5, atol=1e-5)
    assert torch.equal(encoded.embeddings.pooled, pooled)
    assert encoded.t5_ids.shape == (3, T5_LENGTH) and encoded.clip_ids.shape == (3, 77)
    assert encoded.truncated[:2] == ["", ""] and encoded.truncated[2].startswith(("zebra", "ra", "a"))


def test_vae_is_the_pipelines_in_model_space(folder, pipeline) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = base(folder).load_vae()
    mean, std = vae.encode(pixels)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        assert torch.equal(mean, (posterior.mean - 0.1159) * 0.3611)
        assert torch.equal(std, posterior.std * 0.3611)
        decoded = pipeline.vae.decode(mean / 0.3611 + 0.1159).sample.clamp(-1, 1)
    assert torch.equal(vae.decode(mean), decoded)
    assert vae.model.dtype == torch.float32


@pytest.mark.parametrize("asked", [True, False])
def test_a_large_picture_is_decoded_in_tiles(folder, monkeypatch, caplog, asked) -> None:
    """As asked, or when the device cannot take it whole; pictures up to a tile's size are never cut."""
    vae = base(folder).load_vae(tiling=asked)
    assert vae.model.use_tiling == asked
    latents = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    if asked:
        vae.use_tiles(64)
    monkeypatch.setattr(type(vae), "use_tiles", partialmethod(type(vae).use_tiles, 64))
    decode, sizes = vae.model.decoder.forward, []

    def small_card(z, *rest):
        sizes.append(tuple(z.shape[-2:]))
        if max(z.shape[-2:]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z, *rest)

    vae.model.decoder.forward = small_card
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and max(max(size) for size in sizes[not asked :]) == 8
    assert ("decoding in tiles" in caplog.text) is not asked
    vae.decode(latents)
    assert sizes.count((12, 16)) == (not asked), "once is enough to know"


def test_a_tile_that_does_not_fit_is_an_error(folder) -> None:
    vae = base(folder).load_vae(tiling=True)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    vae.model.decoder.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.zeros(1, 16, 8, 8))


def test_half_a_vae(folder) -> None:
    whole, decoder = base(folder).load_vae(), base(folder).load_vae(parts="decoder")
    encoder = base(folder).load_vae(parts="encoder")
    pixels = torch.zeros(1, 3, 16, 16)
    mean, _ = encoder.encode(pixels)
    assert torch.equal(mean, whole.encode(pixels)[0]) and torch.equal(decoder.decode(mean), whole.decode(mean))
    names = lambda vae: {name.split(".")[0] for name in vae.model.state_dict()}
    assert names(decoder) == {"decoder"} and names(encoder) == {"encoder"}


@pytest.mark.parametrize("batch", [1, 2])
def test_predict_is_the_pipelines_call(folder, pipeline, batch) -> None:
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(batch, 16, 4, 6, generator=generator)
    condition = Condition(
        torch.randn(batch, 16, 4, 6, generator=generator),
        (torch.rand(batch, 1, 32, 48, generator=generator) > 0.5) * 1.0,
    )
    text = base(folder).load_text_encoders().encode(CAPTIONS[:batch], T5_LENGTH).embeddings
    t = torch.rand(batch, generator=generator)
    transformer = base(folder).load_transformer()
    ours = predict(transformer, noisy, t, text, condition, guidance=30.0)
    tokens = torch.cat([pack_latents(noisy), pack_latents(condition.latents), pack_mask(condition.mask)], dim=-1)
    with torch.no_grad():
        theirs = pipeline.transformer(
            hidden_states=tokens, timestep=t, guidance=torch.full((batch,), 30.0), pooled_projections=text.pooled,
            encoder_hidden_states=text.t5, txt_ids=torch.zeros(T5_LENGTH, 3), img_ids=image_ids(4, 6),
            return_dict=False,
        )[0]  # fmt: skip
    assert ours.shape == noisy.shape
    assert torch.allclose(ours, unpack_latents(theirs, 4, 6), atol=1e-5)


def test_defaults_and_schedule_come_from_the_folder(folder, copy) -> None:
    assert base(folder).defaults.t5xxl_max_token_length == T5_LENGTH
    assert base(folder).scheduler_config["max_shift"] == 1.15
    (copy / "influx.json").unlink()
    assert (base(copy).defaults.t5xxl_max_token_length, base(copy).defaults.sample_guidance_scale) == (512, 30.0)


def test_identity_follows_content(folder, copy) -> None:
    assert base(folder).identity("vae") == base(copy).identity("vae")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_in.bias"] += 1
    save_file(tensors, weights)
    assert base(folder).identity("vae") != base(copy).identity("vae")
    assert base(folder).identity("text_encoders") == base(copy).identity("text_encoders")
    (copy / "tokenizer" / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert base(folder).identity("text_encoders") != base(copy).identity("text_encoders")


def edit(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_with_a_missing_tensor_is_refused(copy, part) -> None:
    edit(copy / part / "model.safetensors", lambda tensors: tensors.popitem())
    with pytest.raises(ModelError, match="missing"):
        base(copy).load_text_encoders()


def test_names_with_the_old_clip_prefix_load_the_same_weights(folder, copy) -> None:
    def rename(tensors) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["logit_scale"] = torch.zeros(1)

    edit(copy / "text_encoder" / "model.safetensors", rename)
    old = base(folder).load_text_encoders().encode(CAPTIONS, T5_LENGTH)
    new = base(copy).load_text_encoders().encode(CAPTIONS, T5_LENGTH)
    assert torch.equal(old.embeddings.pooled, new.embeddings.pooled)


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_an_empty_tokenizer_folder_is_refused(copy, tokenizer) -> None:
    for file in (copy / tokenizer).iterdir():
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        base(copy).load_text_encoders()


def test_a_tokenizer_of_another_model_is_refused(copy) -> None:
    shutil.rmtree(copy / "tokenizer_2")
    from tests.tiny import t5_tokenizer

    t5_tokenizer([f"word{i}" for i in range(400)]).save_pretrained(copy / "tokenizer_2")
    with pytest.raises(ModelError, match="do not belong together"):
        base(copy).load_text_encoders()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x_embedder.bias"), "1 missing .x_embedder.bias"),
        (lambda t: t.update(spare=torch.zeros(1)), "1 unknown .spare"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(63)}), "misshapen .proj_out.bias"),
    ],
)
def test_every_tensor_of_the_transformer_is_accounted_for(copy, change, message) -> None:
    edit(copy / "transformer" / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        base(copy).load_transformer()


def test_a_transformer_that_is_not_fill_is_named(tmp_path) -> None:
    folder = tiny_base(tmp_path / "dev", in_channels=64)
    with pytest.raises(ModelError, match="FLUX.1 dev"):
        _ = base(folder).shape


def test_sharded_weights_and_variants(folder, copy) -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(copy / "transformer")
    model.save_pretrained(copy / "transformer", max_shard_size="100KB", variant="fp16")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 1
    with pytest.raises(ModelError, match="neither"):
        base(copy).load_transformer()
    parts = ModelTable(pretrained_model_name_or_path=str(folder), transformer=copy / "transformer", variant="fp16")
    ours, sharded = base(folder).load_transformer(), Base.open(parts).load_transformer()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), sharded.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "no base model"), ("./nowhere", "no such folder"), ("a/b/c", "no hub id"), ("not a name", "no hub id")],
)
def test_a_base_that_is_not_there(name, message) -> None:
    with pytest.raises(ModelError, match=message):
        _ = Base.open(ModelTable(pretrained_model_name_or_path=name or None)).shape


def test_opening_a_base_imports_no_torch(folder) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from library.config.tables.model import ModelTable; from library.models.base import Base;"
        f"b = Base.open(ModelTable(pretrained_model_name_or_path={str(folder)!r}));"
        "print(b.shape.hidden, b.scheduler_config['shift'], [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["32", "3.0", "[]"]


def test_pickles_are_pointed_out(copy) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="would run code"):
        base(copy).load_vae()


def test_config_that_contradicts_the_weights(copy) -> None:
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "in_channels": 64}), encoding="utf-8")
    with pytest.raises(ModelError, match="config.json says in_channels = 64, but x_embedder takes 384"):
        base(copy).load_transformer()
