"""Text encoders and VAE in the forecast: against fake-tensor runs of the full-size modules, and their real headers."""

import shutil

import pytest
import torch

from benchmarks.counters import Counter, fake_tensors
from library.config.tables.model import ModelTable
from library.models import cost, layerwise, text
from library.models.base import Base
from library.models.cost import Encode, Picture, encoding
from library.models.encoders import FLUX_ENCODERS, VAE_TILE, encoders_of
from library.models.vae import Vae
from tests.tiny import tiny_base

FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
FLUX_T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False, "use_cache": False, "vocab_size": 32128,
}  # fmt: skip


def peak(action) -> float:
    """Live bytes of what an action allocates, at their highest."""
    counter = Counter()
    with counter, torch.no_grad():
        action()
    return counter.peak(set()) * cost.GB


def flux_vae() -> Vae:
    from diffusers import AutoencoderKL

    return Vae(AutoencoderKL.from_config(FLUX_VAE).eval(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (1408, 448)])
@pytest.mark.parametrize("tiling", [False, True])
def test_the_vae_is_that_of_a_fake_run(width, height, tiling) -> None:
    with fake_tensors():
        vae = flux_vae()
        if tiling:
            vae.use_tiles()
        decoded = peak(lambda: vae.model.decode(torch.empty(1, 16, height // 8, width // 8)))
        encoded = peak(lambda: vae.model.encode(torch.empty(1, 3, height, width)))
    picture = Picture(width, height, tiling=tiling)
    assert decoded == pytest.approx(cost.vae_activations(picture), rel=0.12 if tiling else 0.01)
    assert encoded == pytest.approx(cost.vae_activations(picture, encode=True), rel=0.12 if tiling else 0.01)
    assert cost.vae_activations(Picture(width, height, tiling=True)) <= 1.05 * cost.vae_activations(picture)


def test_tiles_save_where_the_vaes_own_would_not() -> None:
    """FLUX.1's sample_size is 1024: diffusers' tiles would begin above it, and at 32 px for a single file."""
    whole, tiled = (cost.vae_activations(Picture(1024, 1024, tiling=tiling)) for tiling in (False, True))
    assert tiled < 0.3 * whole
    with fake_tensors():
        vae = flux_vae()
        vae.use_tiles()
    assert (vae.model.tile_sample_min_size, vae.model.tile_latent_min_size) == (VAE_TILE, VAE_TILE // 8)


def test_tiles_give_nearly_the_same_picture(tmp_path) -> None:
    vae = Base.open(ModelTable(pretrained_model_name_or_path=str(tiny_base(tmp_path)))).load_vae()
    latents = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(3))
    whole = vae.decode(latents)
    vae.use_tiles(64)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.2


@pytest.mark.parametrize(("batch", "length"), [(8, 512), (8, 256), (1, 512)])
def test_t5_is_that_of_a_fake_run(batch, length) -> None:
    from transformers import T5Config, T5EncoderModel

    with fake_tensors():
        torch.set_default_dtype(torch.bfloat16)
        model = T5EncoderModel(T5Config(num_layers=2, **FLUX_T5)).eval()
        torch.set_default_dtype(torch.float32)
        measured = peak(lambda: model(torch.zeros(batch, length, dtype=torch.long)))
    phases = cost.caching_phases(Encode(batch, 0, 0, 0, length, text_batch=batch))
    assert phases["text encoders"].parts["activations"] == pytest.approx(measured, rel=0.12)


def test_the_constants_are_those_of_the_encoders() -> None:
    assert encoding.LAYERWISE_BATCH == layerwise.BATCH
    assert encoding.LAYERWISE_CAPTIONS == text.LAYERWISE_CAPTIONS
    assert encoding.WHOLE_T5_BYTES == text.WHOLE_T5_BYTES
    with fake_tensors():
        vae = flux_vae().model
        counted = [sum(p.numel() for p in half.parameters()) for half in (vae.encoder, vae.decoder)]
    assert counted == [FLUX_ENCODERS.vae_encoder, FLUX_ENCODERS.vae_decoder]


def test_sizes_come_from_the_bases_own_headers(tmp_path) -> None:
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(tiny_base(tmp_path))))
    found, vae, encoders = encoders_of(base), base.load_vae(), base.load_text_encoders()
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert (found.vae_encoder, found.vae_decoder) == (count(vae.model.encoder), count(vae.model.decoder))
    assert (found.t5, found.clip) == (count(encoders.t5), count(encoders.clip))
    assert found.t5_layer == max(count(block) for block in encoders.t5.encoder.block)
    shutil.rmtree(tmp_path / "text_encoder_2")
    assert encoders_of(base).t5 == FLUX_ENCODERS.t5 and encoders_of(base).vae_decoder == found.vae_decoder


def test_layer_by_layer_t5_lives_in_ram() -> None:
    work = Encode(captions=1000, pixels=1024**2, width=1024, height=1024, layerwise=True)
    whole = Encode(captions=1000, pixels=1024**2, width=1024, height=1024)
    there, here = cost.caching_phases(work)["text encoders"], cost.caching_phases(whole)["text encoders"]
    assert there.total < 3.0e9 < 10e9 < here.total
    ram, less = cost.caching_ram(work)["text encoders"], cost.caching_ram(whole)["text encoders"]
    assert ram.parts["T5"] == 2 * FLUX_ENCODERS.t5 and ram.total - less.total > 9e9
    few = cost.caching_ram(Encode(10, 0, 0, 0, layerwise=True))["text encoders"]
    assert few.parts["captions between its layers"] == 3 * 10 * 512 * 4096 * 2


def test_times_are_those_of_the_counted_flops() -> None:
    """TFLOP of FLUX.1's own encoders: VAE 1.118 and 4.883 at 512 and 1024 px, T5 4.845 and 2.397 at 512 and 256."""
    card = next(card for card in cost.CARDS if card.name == "RTX 3060")
    for side, tflop in ((512, 1.118), (1024, 4.883)):
        _, images = cost.encoding_seconds(Encode(0, 10 * side**2, side, side), card)
        assert images == pytest.approx(10 * tflop / (12.7 * 0.4), rel=0.01)
    for length, tflop in ((512, 4.845), (256, 2.397)):
        texts, _ = cost.encoding_seconds(Encode(10, 0, 0, 0, length), card)
        assert texts == pytest.approx(10 * tflop / (25.5 * 0.4), rel=0.02)
    streamed, _ = cost.encoding_seconds(Encode(1, 0, 0, 0, 512, layerwise=True), card)
    assert streamed == pytest.approx(2 * FLUX_ENCODERS.t5 / 6e9, rel=0.01)
