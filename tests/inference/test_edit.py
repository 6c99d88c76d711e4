"""Edits carried out on the tiny base: the whole job against FluxFillPipeline, and what comes out as files."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from PIL import Image

from library import inference
from library.config import Run
from library.errors import ConfigError, NonFiniteError, OutOfMemory
from library.flow.draws import normal
from library.inference import edit as carried_out
from library.models.base import Base
from library.tensorfile import save_tensors
from tests.oracle.reference import noisy_mask, noisy_picture, run_oracle

Ask = Callable[..., Run]
BASE_ALONE = ["--lora", "none", "--seed", "5", "--sample_steps", "3", "--t5xxl_max_token_length", "32"]
EXACT = ["--t5xxl_precision", "fp32"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("mode", ["edit", "mask", "spatial"])
def test_the_whole_job_is_the_pipeline(mode: str, ask: Ask, folder: Path, base_folder: Path) -> None:
    """influx_infer's file against the pipeline's picture from the same noise: at most one level of 255 apart."""
    words = ["--mode", mode, *(["--mask", str(folder / "masks" / "b.png")] if mode == "mask" else [])]
    inference.run(ask(*BASE_ALONE, *EXACT, *words, "--keep_unmasked", "false", image="in/b.png"))

    image = Image.open(folder / "in" / "b.png")
    mask = Image.open(folder / "masks" / "b.png") if mode == "mask" else Image.new("L", image.size, 255)
    if mode == "spatial":
        canvas, mask = Image.new("RGB", (192, 64)), Image.new("L", (192, 64))
        canvas.paste(image, (0, 0))
        mask.paste(255, (96, 0, 192, 64))
        image = canvas
    pipeline = FluxFillPipeline.from_pretrained(base_folder)
    noise = normal((16, image.height // 8, image.width // 8), 5, "sample")[None]
    oracle = run_oracle(
        pipeline, image, mask, "a red circle", noise, edit=mode == "edit", guidance=3.5, steps=3, output_type="pil"
    )
    theirs = np.asarray(oracle.output[0]).astype(int)[:, -96:]
    ours = pixels(folder / "out" / "edited" / "b.png")
    assert ours.shape == (64, 96, 3)
    assert abs(ours - theirs).max() <= 1


def test_a_folder_in_batches_is_the_pictures_alone(ask: Ask, folder: Path) -> None:
    for stem in "de":
        noisy_picture(64, 64, seed=ord(stem)).save(folder / "in" / f"{stem}.png")
    inference.run(ask(*BASE_ALONE, "--mode", "edit", "--output", str(folder / "one")))
    inference.run(ask(*BASE_ALONE, "--mode", "edit", "--output", str(folder / "four"), "--inference_batch_size", "4"))
    assert sorted(path.name for path in (folder / "one").glob("*.png")) == [f"{stem}.png" for stem in "abcde"]
    for stem in "abcde":
        assert abs(pixels(folder / "one" / f"{stem}.png") - pixels(folder / "four" / f"{stem}.png")).max() <= 1
    assert abs(pixels(folder / "one" / "a.png") - pixels(folder / "one" / "d.png")).mean() > 1


def test_unmasked_pixels_come_back_untouched(ask: Ask, folder: Path) -> None:
    big, mask = (
        noisy_picture(150, 130),
        Image.fromarray((np.arange(150 * 130).reshape(130, 150) % 150 > 70).astype("u1") * 255),
    )
    big.save(folder / "big.png")
    mask.save(folder / "big_mask.png")
    words = ["--mode", "mask", "--mask", str(folder / "big_mask.png"), "--resolution", "64"]
    inference.run(ask(*BASE_ALONE, *words, image="big.png"))
    result, kept = pixels(folder / "out" / "edited" / "big.png"), np.asarray(mask) == 0
    assert result.shape == (130, 150, 3), "the picture's own size comes back"
    assert (result[kept] == np.asarray(big)[kept]).all()
    assert abs(result[~kept] - np.asarray(big)[~kept]).mean() > 5


def test_sizes_are_kept_unless_asked_otherwise(ask: Ask, folder: Path) -> None:
    words = [*BASE_ALONE, "--mode", "edit", "--resolution", "64"]
    inference.run(ask(*words, image="in/c.png"))
    inference.run(
        ask(
            *words,
            "--result_size",
            "edited",
            image="in/c.png",
        )
    )
    inference.run(
        ask(*BASE_ALONE, "--mode", "edit", "--width", "40", "--height", "56", "--fit", "crop", image="in/c.png")
    )
    sizes = [Image.open(folder / "out" / "edited" / name).size for name in ("c.png", "c_2.png", "c_3.png")]
    assert sizes == [(50, 80), (48, 77), (40, 56)]


def test_a_constant_picture_stays_where_it_was(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model taken out (the condition is decoded), crop, filling and scaling back give the picture itself."""
    halves = np.zeros((70, 110, 3), np.uint8)
    halves[:, 55:] = 255
    Image.fromarray(halves).save(folder / "halves.png")
    seen = {}

    def decode_nothing(self, latents):
        height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
        seen["size"] = (width, height)
        edge = round(55 * seen["size"][0] / 112)
        painted = -torch.ones(1, 3, height, width)
        painted[..., edge:] = 1
        return painted

    monkeypatch.setattr("library.models.vae.Vae.decode", decode_nothing)
    inference.run(ask(*BASE_ALONE, "--mode", "edit", "--resolution", "96", image="halves.png"))
    result = pixels(folder / "out" / "edited" / "halves.png")
    assert result.shape == (70, 110, 3)
    assert (result[:, :52] == 0).all() and (result[:, 58:] == 255).all()


def test_the_file_says_how_it_was_made(ask: Ask, folder: Path) -> None:
    inference.run(ask(*BASE_ALONE, "--mode", "edit", image="in/a.png", prompt="ein rötlicher Kreis"))
    info = Image.open(folder / "out" / "edited" / "a.png").info
    settings = json.loads(info["influx"])
    assert settings["prompt"] == "ein rötlicher Kreis"
    assert (settings["mode"], settings["seed"], settings["steps"], settings["guidance"]) == ("edit", 5, 3, 3.5)
    assert info["parameters"].startswith("ein rötlicher Kreis\nmode: edit, seed: 5, steps: 3")
    assert str(folder) not in info["influx"] + info["parameters"], "no path of this machine leaves it"


def random_network(path: Path, scale: float) -> Path:
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=draw), torch.randn(96, 4, generator=draw) * scale
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)}
    save_tensors(path, tensors, {"influx_modes": '["edit"]'})
    return path


def test_networks_add_up_with_their_strengths(ask: Ask, folder: Path) -> None:
    network = random_network(folder / "n.safetensors", 0.3)

    def made(*words: str) -> np.ndarray:
        before = set((folder / "out" / "edited").glob("*.png")) if (folder / "out" / "edited").exists() else set()
        inference.run(ask(*BASE_ALONE[2:], *words, image="in/a.png"))
        (new,) = set((folder / "out" / "edited").glob("*.png")) - before
        return pixels(new)

    base = made("--lora", "none", "--mode", "edit")
    full = made("--lora", str(network))
    assert abs(full - base).mean() > 1
    assert (made("--lora", str(network), "--lora_strength", "0") == base).all()
    assert abs(made("--lora", f"{network};{network}", "--lora_strength", "0.5;0.5") - full).max() <= 1
    assert abs(made("--lora", f"{network};{network}", "--lora_strength", "1;-1") - base).max() <= 1


def test_a_picture_of_nan_is_refused(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = "library.sampling.denoise.predict"
    monkeypatch.setattr(predict, lambda transformer, noisy, *rest: torch.full_like(noisy, float("nan")))
    with pytest.raises(NonFiniteError, match="NaN"):
        inference.run(ask(*BASE_ALONE, "--mode", "edit", image="in/a.png"))
    assert not (folder / "out").exists()


def test_out_of_memory_names_the_knobs(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(carried_out, "sample", too_much)
    with pytest.raises(OutOfMemory, match="blocks_to_swap") as caught:
        inference.run(ask(*BASE_ALONE, "--mode", "edit", image="in/a.png"))
    assert caught.value.exit_code == 4


def test_edit_in_a_region_takes_its_mask(ask: Ask, folder: Path) -> None:
    noisy_mask(64, 64, seed=9).save(folder / "region.png")
    words = [*BASE_ALONE, "--mode", "edit", "--keep_unmasked", "false"]
    inference.run(ask(*words, "--output", str(folder / "whole.png"), image="in/a.png"))
    inference.run(
        ask(*words, "--output", str(folder / "part.png"), "--mask", str(folder / "region.png"), image="in/a.png")
    )
    assert abs(pixels(folder / "whole.png") - pixels(folder / "part.png")).mean() > 0.5


def test_what_the_device_cannot_do_is_said_before_anything_is_loaded(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "load_text_encoders", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="attention_backend = cudnn does not work on the CPU with fp32"):
        inference.run(ask("--lora", "none", "--mode", "edit", "--attention_backend", "cudnn"))


def test_the_resolved_configuration_lies_beside_the_results(ask: Ask, folder: Path) -> None:
    """In a folder, as of the last call; a single file that was named is left alone with what it says itself."""
    words = [*BASE_ALONE, "--mode", "edit"]
    inference.run(ask(*words, "--hub_token", "hf_secret", image="in/a.png"))
    text = (folder / "out/edited/config.edited.toml").read_text(encoding="utf-8")
    written = tomllib.loads(text)
    assert written["inference"]["prompt"] == ["a red circle"] and written["training"]["seed"] == 5
    assert "--seed" in text and "hf_secret" not in text
    (folder / "alone").mkdir()
    inference.run(ask(*words, "--output", str(folder / "alone/x.png"), image="in/a.png"))
    assert [path.name for path in (folder / "alone").iterdir()] == ["x.png"]
