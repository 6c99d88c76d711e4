"""The committed nano base: FLUX.1-Fill-dev's layout and classes, whole tokenizers, and it has learnt to inpaint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from PIL import Image
from safetensors.torch import load_file

from tools.nano.measure import HELD_OUT, Base
from tools.nano.scenes import make_scene

NANO = Path(__file__).resolve().parents[2] / "nano"


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(NANO)


def test_layout_and_classes(base: Base) -> None:
    index = json.loads((NANO / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"
    names = {name: value[1] for name, value in index.items() if isinstance(value, list)}
    assert names == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    config = base.pipeline.transformer.config
    assert (config.in_channels, config.out_channels, config.guidance_embeds) == (384, 64, True)
    assert base.pipeline.vae.config.latent_channels == 16
    assert base.pipeline.vae_scale_factor == 8
    scheduler = base.pipeline.scheduler.config
    assert (scheduler.base_shift, scheduler.max_shift, scheduler.shift) == (0.5, 1.15, 3.0)
    assert scheduler.use_dynamic_shifting


def test_weights_are_small_and_every_text_weight_is_loaded(base: Base) -> None:
    files = list(NANO.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not list(NANO.rglob("*.bin"))
    for name in ("text_encoder", "text_encoder_2"):
        saved, loaded = load_file(NANO / name / "model.safetensors"), getattr(base.pipeline, name).state_dict()
        assert saved
        assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_token_ids_survive_the_folder(base: Base) -> None:
    text = "Red circle with navy background."
    t5, clip = base.pipeline.tokenizer_2, base.pipeline.tokenizer
    assert (len(t5), len(clip)) == (430, 808)
    assert t5.convert_ids_to_tokens(t5(text).input_ids) == [
        "▁Red",
        "▁circle",
        "▁with",
        "▁navy",
        "▁background",
        ".",
        "</s>",
    ]
    words = [token.removesuffix("</w>") for token in clip.convert_ids_to_tokens(clip(text).input_ids)]
    assert words == ["<|startoftext|>", "red", "circle", "with", "navy", "background", ".", "<|endoftext|>"]
    assert t5.model_max_length == 512
    assert clip.model_max_length == 77


def test_tokenizers_come_back_the_same_after_saving(base: Base, tmp_path: Path) -> None:
    texts = [make_scene(HELD_OUT, index).caption for index in range(100)] + ["Zebra, 12 x!", ""]
    for name in ("tokenizer", "tokenizer_2"):
        before = getattr(base.pipeline, name)
        before.save_pretrained(tmp_path / name)
        after = type(before).from_pretrained(tmp_path / name)
        assert before(texts).input_ids == after(texts).input_ids


def test_text_encoder_carries_word_order(base: Base) -> None:
    texts = ["red circle with blue background", "blue circle with red background"]
    states, _, _ = base.pipeline.encode_prompt(texts, texts, max_sequence_length=16)
    red_first, red_last = states[0, 0], states[1, 3]
    assert (red_first - red_last).norm() > 0.3 * red_first.norm()


def test_it_inpaints(base: Base) -> None:
    scenes = [make_scene(HELD_OUT, index) for index in range(16)]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 24, 40, 64))
    masks = [mask] * 16
    answers = base.fill([s.image for s in scenes], masks, [s.caption for s in scenes])
    hole = np.asarray(masks[0]) > 127
    differences = [np.abs(np.asarray(a, float) - np.asarray(s.image)) for a, s in zip(answers, scenes, strict=True)]
    grey = [np.abs(127.0 - np.asarray(s.image)) for s in scenes]
    inside, outside = (np.mean([d[part].mean() for d in differences]) for part in (hole, ~hole))
    assert outside < 12
    assert inside < 0.5 * np.mean([d[hole].mean() for d in grey])


def test_it_follows_colour_words(base: Base) -> None:
    colours = {"red": (222, 30, 35), "blue": (35, 75, 225), "yellow": (250, 225, 45), "black": (15, 15, 15)}
    images = base.draw([f"a plain {name} picture" for name in colours])
    for image, rgb in zip(images, colours.values(), strict=True):
        assert np.linalg.norm(np.asarray(image, float).mean(axis=(0, 1)) - rgb) < 45


def test_other_sizes_run(base: Base) -> None:
    image = Image.new("RGB", (96, 64), (250, 225, 45))
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (32, 16, 64, 48))
    (answer,) = base.fill([image], [mask], ["yellow background"])
    assert answer.size == (96, 64)
    assert np.abs(np.asarray(answer, float) - np.asarray(image)).mean() < 30


def test_pipeline_class_is_the_stock_one(base: Base) -> None:
    assert type(base.pipeline) is FluxFillPipeline
