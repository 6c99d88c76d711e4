"""train_text_encoder: CLIP-L alone is loaded, trained from cached token ids, saved, resumed, and used by inference."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file

from library.config.tables import ModelTable
from library.models.base import Base
from library.networks.clip import attention_linears, merge_text
from library.networks.loading import load_network
from tests.training.project import Project
from tests.training.test_run import PROBE, ROOT

OPTIONS = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "adam_weight_decay_text_encoder": 0.0}


def clip_tensors(path) -> dict[str, torch.Tensor]:
    """CLIP's part of a file."""
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("lora_te1_")}


def test_clip_is_trained_and_saved(project, tmp_path):
    """Eight linears of two layers, under kohya's names; their rate is their own; nothing of it without the option."""
    assert project.train(output_dir=tmp_path / "with", **OPTIONS) == 0
    assert project.train(output_dir=tmp_path / "without") == 0
    trained = clip_tensors(tmp_path / "with/net.safetensors")
    assert len([name for name in trained if name.endswith("lora_up.weight")]) == 8
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_up" in name)
    assert clip_tensors(tmp_path / "without/net.safetensors") == {}
    line = json.loads((tmp_path / "with/metrics.jsonl").read_text().splitlines()[0])
    assert (line["lr/text_encoder"], line["lr/transformer"]) == (1e-2, 1e-3)


def test_its_weight_decay_is_its_own(project, tmp_path):
    """adam_weight_decay_text_encoder acts on CLIP's part alone."""
    for name, decay in (("a", 0.0), ("b", 50.0)):
        options = {**OPTIONS, "adam_weight_decay_text_encoder": decay, "max_train_steps": 1}
        assert project.train(output_dir=tmp_path / name, **options) == 0
    a, b = (load_file(tmp_path / name / "net.safetensors") for name in "ab")
    differ = {name for name in a if not torch.equal(a[name], b[name])}
    assert differ and all(name.startswith("lora_te1_") for name in differ)


def test_resuming_is_bit_identical(project, tmp_path):
    """Both networks and their optimizer."""
    options = {**OPTIONS, "save_every_n_steps": 2, "use_ema": True}
    assert project.train(output_dir=tmp_path / "whole", max_train_steps=4, **options) == 0
    state = tmp_path / "whole/net-step00000002-state"
    assert project.train(output_dir=tmp_path / "half", max_train_steps=4, resume=state, **options) == 0
    for file in ("net.safetensors", "net-ema.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "half" / file)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_clip_is_in_memory(project):
    """T5 and the VAE stay away."""
    words = project.words("out", train_text_encoder=True)
    done = subprocess.run([sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True, text=True, timeout=180)
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert "RESULT 0 3" in result and "CLIPTextModel" in result, done.stderr[-2000:]
    assert not any(name in result for name in ("T5EncoderModel", "T5Stack", "Vae", "AutoencoderKL"))


def test_inference_merges_what_was_trained(project, tmp_path):
    """The merged CLIP gives the pooled vectors that training saw."""
    assert project.train(**OPTIONS) == 0
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(project.base)))
    clip = base.load_clip()
    ids = torch.arange(77)[None] % 50
    before = clip(ids).pooler_output
    network = load_network(tmp_path / "out/net.safetensors")
    weights = {name: linear.weight.clone() for name, linear in attention_linears(clip).items()}
    assert merge_text(clip, [(network, 1.0)]) == 8
    assert (clip(ids).pooler_output - before).abs().max() > 1e-5
    merge_text(clip, [(network, -1.0)])
    for name, linear in attention_linears(clip).items():
        torch.testing.assert_close(linear.weight, weights[name], rtol=1e-5, atol=1e-6)


def test_previews_use_the_trained_clip(cached, tmp_path):
    """The same prompt is painted with the pooled vector of the moment."""
    settings = {
        "validation_prompt": "make it red", "validation_image": cached.root / "source" / "0.png",
        "validation_width": 64, "validation_height": 64, "sample_steps": 2,
        "dataset_cache_dir": tmp_path / "cache",
    }  # fmt: skip
    project = Project(cached.root, cached.base, settings=settings).cache()
    options = {"sample_every_n_steps": 1, "max_train_steps": 2, "learning_rate": 0.0}
    assert project.train(output_dir=tmp_path / "out", **{**OPTIONS, "text_encoder_lr": 0.3}, **options) == 0
    one, two = (tmp_path / f"out/sample/net_00_0000000{step}.png" for step in (1, 2))
    assert one.read_bytes() != two.read_bytes()
    from PIL import Image, ImageChops

    with Image.open(one) as a, Image.open(two) as b:
        assert ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is not None
