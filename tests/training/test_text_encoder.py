"""train_text_encoder: CLIP-L alone is loaded, trained from cached token ids, saved, resumed, and used by inference."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.config.tables import ModelTable
from library.config.tables.network import NetworkTable
from library.models.base import Base
from library.networks.clip import attention_linears, build_clip, merge_text
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


def products(path) -> dict[str, torch.Tensor]:
    """CLIP's changes in a file, by module."""
    return {module: factors.delta() for module, factors in load_network(path).change.text.items()}


STILL = {"learning_rate": 1e-12, "text_encoder_lr": 1e-12, "max_train_steps": 1}


@pytest.mark.parametrize("more", [{}, {"network_dim": 6}, {"dim_from_weights": True, "network_dim": 2}])
def test_a_warm_start_takes_clip_along(project, tmp_path, more):
    """Its change to CLIP-L is the file's, whatever the rank; so is the scale it goes on with."""
    options = {**OPTIONS, "network_alpha": 2.0, "network_dim": 4}
    assert project.train(output_dir=tmp_path / "first", **options) == 0
    start = tmp_path / "first/net.safetensors"
    assert project.train(output_dir=tmp_path / "second", network_weights=start, **{**OPTIONS, **STILL, **more}) == 0
    before, after = products(start), products(tmp_path / "second/net.safetensors")
    assert before.keys() == after.keys() and len(before) == 8
    for module, delta in before.items():
        assert delta.abs().max() > 0
        torch.testing.assert_close(after[module], delta, rtol=1e-4, atol=1e-8, msg=module)
    scales = [load_network(tmp_path / name / "net.safetensors").metadata["influx_trained_scale"] for name in
              ("first", "second")]  # fmt: skip
    assert scales[0] == scales[1] == '{"": 0.5}'


def test_clips_part_is_never_dropped_without_a_word(project, tmp_path, capsys):
    """A run that does not train CLIP-L refuses a file that does, as a start and as a part of the base."""
    assert project.train(output_dir=tmp_path / "first", **OPTIONS) == 0
    start = tmp_path / "first/net.safetensors"
    for key in ("network_weights", "base_weights"):
        for command in ({}, {"dry_run": True}):
            assert project.train(output_dir=tmp_path / "second", **{key: start}, **command) == 2
            error = capsys.readouterr().err
            assert key in error and "CLIP-L (8 modules)" in error and "train_text_encoder = true" in error
    assert project.train(output_dir=tmp_path / "third", network_weights=start, text_encoder_dim=2, **OPTIONS) == 2
    assert "text_encoder_dim" in capsys.readouterr().err


def test_base_weights_reach_clip(project, tmp_path):
    """Where CLIP-L is trained, it starts from the merged one."""
    assert project.train(output_dir=tmp_path / "first", **OPTIONS) == 0
    file = tmp_path / "first/net.safetensors"
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(project.base)))
    merged, plain = base.load_clip(), base.load_clip()
    build_clip(NetworkTable(train_text_encoder=True, base_weights=(file,)), merged)
    ids = torch.arange(77)[None] % 50
    before = plain(ids).pooler_output
    merge_text(plain, [(load_network(file), 1.0)])
    assert torch.equal(merged(ids).pooler_output, plain(ids).pooler_output)
    assert not torch.equal(merged(ids).pooler_output, before)


def test_a_split_lycoris_file_keeps_clip(project, tmp_path):
    """Its names are LyCORIS's for the transformer, kohya's for CLIP-L."""
    options = {"network_module": "lokr", "network_layout": "split", **OPTIONS}
    assert project.train(output_dir=tmp_path / "out", **options) == 0
    names = load_file(tmp_path / "out/net.safetensors")
    assert any(name.startswith("lycoris_") for name in names)
    assert len(products(tmp_path / "out/net.safetensors")) == 8


def test_the_workflow_applies_clip_too(project, tmp_path):
    """A network that trains CLIP-L is loaded on both models; others on one."""
    for name, options, kind in (("with", OPTIONS, "LoraLoader"), ("without", {}, "LoraLoaderModelOnly")):
        assert project.train(output_dir=tmp_path / name, max_train_steps=1, **options) == 0
        graph = json.loads((tmp_path / name / "net_workflow_api.json").read_text())
        (loader,) = [node for node in graph.values() if node["class_type"].startswith("LoraLoader")]
        assert loader["class_type"] == kind
        (text,) = [node for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
        source, slot = text["inputs"]["clip"]
        assert (graph[source]["class_type"], slot) == (("LoraLoader", 1) if options else ("DualCLIPLoader", 0))
