"""Previews: the same pictures inference makes, without text encoders, without holding the VAE, never ending a run."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library import inference, previews
from library.conditioning import MODES, ModeSettings
from library.conditioning.item import Condition
from library.config import load
from library.config.tables import ModelTable
from library.data.cached import CachedPreview
from library.data.prompts import PreviewRequest
from library.models.base import Base
from library.previews import Previews, PreviewSettings, Strip, draw_table, shown_steps
from tests.oracle.reference import noisy_picture
from tests.tiny import T5_LENGTH, tiny_base

PROMPT = "a red circle"
SETTINGS = PreviewSettings(steps=3, guidance=3.5, seed=5, name="run")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny_base(tmp_path_factory.mktemp("previews") / "base")
    return Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def transformer(base: Base):
    return base.load_transformer()


@pytest.fixture(scope="module")
def cached(base: Base) -> list[CachedPreview]:
    """An edit and a spatial preview of the same picture, as the cache hands them out."""
    text = base.load_text_encoders().encode([PROMPT], T5_LENGTH).embeddings
    vae = base.load_vae()
    pixels = torch.from_numpy(np.asarray(noisy_picture(64, 48)).copy()).permute(2, 0, 1).float() / 127.5 - 1
    found = []
    for mode in ("edit", "spatial"):
        item = MODES[mode].request(pixels, None, ModeSettings(mask_only_right=True))
        condition = Condition(vae.encode(item.condition_pixels()[None])[0], item.mask[None])
        found.append(CachedPreview(PreviewRequest(PROMPT), mode, text, None, condition))
    return found


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_preview_is_what_inference_makes(base: Base, transformer, cached, tmp_path: Path) -> None:
    made = Previews(cached, base, SETTINGS, tmp_path).make(transformer, 7)
    assert list(made) == ["run_00_00000007", "run_01_00000007"]
    noisy_picture(64, 48).save(tmp_path / "p.png")
    for number, mode in enumerate(("edit", "spatial")):
        out = tmp_path / f"{mode}.png"
        words = ["--pretrained_model_name_or_path", base.name, "--image", str(tmp_path / "p.png"), "--prompt", PROMPT]
        words += ["--lora", "none", "--mode", mode, "--seed", "5", "--sample_steps", "3", "--output", str(out)]
        inference.run(load([*words, "--t5xxl_precision", "fp32", "--t5xxl_max_token_length", str(T5_LENGTH)], "infer"))
        preview = pixels_of(made[f"run_{number:02d}_00000007"])
        assert preview.shape == (48, 64, 3), "the canvas is cropped to the user's part"
        assert abs(preview - pixels_of(out)).max() <= 1


def test_a_preview_says_how_it_was_made(base: Base, transformer, cached, tmp_path: Path) -> None:
    own = replace(cached[0], request=PreviewRequest(PROMPT, seed=40, copy=2, steps=2, guidance=9.0))
    made = Previews([own], base, SETTINGS, tmp_path).make(transformer, 3)
    said = json.loads(Image.open(made["run_00_00000003"]).info["influx"])
    assert (said["seed"], said["steps"], said["guidance"], said["training step"]) == (42, 2, 9.0, 3)
    assert (said["prompt"], said["mode"], said["size"]) == (PROMPT, "edit", "64x48")


def test_what_pushes_away_is_said_too(base: Base, transformer, cached, tmp_path: Path) -> None:
    for name, scale, known in (("with", 3.0, True), ("without", 1.0, False)):
        own = replace(
            cached[0], request=PreviewRequest(PROMPT, negative="blur", cfg_scale=scale), negative=cached[0].text
        )
        made = Previews([own], base, SETTINGS, tmp_path / name).make(transformer, 3)
        said = json.loads(Image.open(made["run_00_00000003"]).info["influx"])
        assert (said.get("negative prompt"), said.get("cfg scale")) == (("blur", scale) if known else (None, None))


def test_a_negative_prompt_pushes_away(base: Base, transformer, cached, tmp_path: Path) -> None:
    plain = Previews(cached[:1], base, SETTINGS, tmp_path / "plain").make(transformer, 1)["run_00_00000001"]
    other = replace(cached[0].text, t5=cached[0].text.t5.flip(-1))

    def with_scale(scale: float | None) -> np.ndarray:
        request = PreviewRequest(PROMPT, negative="x", cfg_scale=scale)
        one = replace(cached[0], request=request, negative=other)
        return pixels_of(Previews([one], base, SETTINGS, tmp_path / str(scale)).make(transformer, 1)["run_00_00000001"])

    assert (with_scale(None) == pixels_of(plain)).all() and (with_scale(1.0) == pixels_of(plain)).all()
    assert abs(with_scale(3.0) - pixels_of(plain)).mean() > 0.1


def test_no_text_encoder_and_the_decoder_only_while_decoding(
    base: Base, transformer, cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, weakref.ref]] = []
    load_vae = Base.load_vae

    def watched(self, device="cpu", dtype=None, parts="both", tiling=False):
        assert not any(module() is not None for _, module in loaded), "the decoder of before is still there"
        vae = load_vae(self, device, dtype, parts, tiling)
        loaded.append((parts, weakref.ref(vae.model)))
        return vae

    def painting(*args, **kwargs):
        gc.collect()
        assert not any(module() is not None for _, module in loaded), "the VAE is held while denoising"
        return sample(*args, **kwargs)

    sample = previews.sample
    monkeypatch.setattr(Base, "load_vae", watched)
    monkeypatch.setattr(Base, "load_text_encoders", lambda *args: pytest.fail("a text encoder was loaded"))
    monkeypatch.setattr(previews, "sample", painting)
    book = Previews(cached, base, SETTINGS, tmp_path)
    book.make(transformer, 1)
    book.make(transformer, 2)
    assert [parts for parts, _ in loaded] == ["decoder", "decoder"]
    gc.collect()
    assert all(module() is None for _, module in loaded)


def test_the_table_grows_and_survives_a_restart(base: Base, transformer, cached, tmp_path: Path) -> None:
    Previews(cached, base, SETTINGS, tmp_path).make(transformer, 0)
    first = Image.open(tmp_path / "previews.png").size
    again = Previews(cached, base, SETTINGS, tmp_path)
    again.make(transformer, 50)
    strips = again.strips()
    assert [sorted(strip.pictures) for strip in strips] == [[0, 50], [0, 50]]
    assert all(strip.source.exists() for strip in strips)
    second = Image.open(tmp_path / "previews.png").size
    assert second[0] == first[0] and second[1] - first[1] == 256 * 48 // 64 + 4


def test_the_table_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    colours = {"source": (10, 20, 30), 0: (200, 0, 0), 100: (0, 200, 0)}
    paths = {}
    for name, colour in colours.items():
        paths[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (64, 64), colour).save(paths[name])
    strips = [
        Strip("one", paths["source"], {0: paths[0], 100: paths[100]}),
        Strip("two " * 40, paths["source"], {100: paths[100]}),
    ]
    table = draw_table(strips)
    across = [90 + 128, 90 + 260 + 128]
    down = [18 + 128, 18 + 260 + 128, 18 + 520 + 128]
    seen = [[table.getpixel((x, y)) for x in across] for y in down]
    white = (255, 255, 255)
    assert seen == [[colours["source"]] * 2, [colours[0], white], [colours[100]] * 2]
    paths[0].unlink()
    assert draw_table(strips).getpixel((across[0], 18 + 260 + 8)) == white, "a removed picture leaves its place empty"


def test_a_long_run_keeps_its_table_small() -> None:
    steps = list(range(0, 10000, 50))
    shown = shown_steps(steps)
    assert len(shown) == 32 and shown[0] == 0 and shown[-1] == 9950 and sorted(set(shown)) == shown
    assert shown_steps([1, 2]) == [1, 2]


@pytest.mark.parametrize("failure", ["nan", "memory"])
def test_a_failed_preview_never_ends_a_run(
    failure: str, base: Base, transformer, cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    sample, calls = previews.sample, []

    def first_fails(transformer, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            return sample(transformer, *args, **kwargs)
        if failure == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        with monkeypatch.context() as patch:
            patch.setattr("library.sampling.denoise.predict", lambda t, noisy, *rest: noisy * float("nan"))
            return sample(transformer, *args, **kwargs)

    monkeypatch.setattr(previews, "sample", first_fails)
    made = Previews(cached, base, SETTINGS, tmp_path).make(transformer, 1)
    assert list(made) == ["run_01_00000001"]
    assert "preview 1 is left out" in caplog.text
