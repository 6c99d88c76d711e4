"""The training command on a small project: what it writes, what it leaves alone, what is in memory meanwhile."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training.project import Project, make_pairs

ROOT = Path(__file__).resolve().parents[2]


def metrics(project: Project, output: str = "out") -> list[dict]:
    """Lines of metrics.jsonl."""
    path = project.settings.get("output_dir", project.root / output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_what_it_promises(project, tmp_path):
    """Network, numbers, resolved configuration; whole files that others may read, and nothing left over."""
    assert project.train(report_html=True, report_to="tensorboard") == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir() if "_workflow" not in path.name}
    assert names == {"net.safetensors", "net-state", "metrics.jsonl", "config.resolved.toml", "run.json", "report.html",
                     "logs", ".influx.lock"}  # fmt: skip
    assert (out / "net.safetensors").stat().st_mode & 0o777 == 0o644
    lines = metrics(project)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["lr/transformer"] == 1e-3 for line in lines)
    assert tomllib.loads((out / "config.resolved.toml").read_text())["network"]["network_dim"] == 4
    assert any(path.name.startswith("events") for path in (out / "logs").rglob("*"))


def test_equal_seeds_give_equal_files_and_others_do_not(project, tmp_path):
    """Every draw is keyed: the data region is identical, whatever was run before in this process."""
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        torch.manual_seed(len(name))
        assert project.train(output_dir=tmp_path / name, seed=seed) == 0
    hashes = [Project(tmp_path, project.base).trained(name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_equal_files_to_the_byte_with_a_fixed_clock(project, tmp_path, monkeypatch):
    """Metadata agrees as well when the time does."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in "ab":
        assert project.train(output_dir=tmp_path / name / "out") == 0
    assert (tmp_path / "a/out/net.safetensors").read_bytes() == (tmp_path / "b/out/net.safetensors").read_bytes()


def test_the_file_says_how_it_was_made(project, tmp_path):
    """Mode, guidance, size and configuration travel in the file; folders and user names do not."""
    assert project.train(guidance_scale=1.0, trigger_words="xyz") == 0
    with safe_open(tmp_path / "out/net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["influx_modes"]) == ["edit"]
    assert metadata["influx_train_guidance"] == "1.0"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["influx_resolution"] == "64x64"
    assert str(tmp_path) not in json.dumps(metadata)
    assert str(project.base) not in json.dumps(metadata)


def test_x_embedder_moves_when_asked_and_only_then(project, tmp_path):
    """Asked: it is in the optimizer and in the file. Not asked: nothing of it is trained or saved."""
    assert project.train(output_dir=tmp_path / "with", train_x_embedder=True) == 0
    assert project.train(output_dir=tmp_path / "without") == 0
    moved, plain = (load_file(tmp_path / name / "net.safetensors") for name in ("with", "without"))
    inputs = [name for name in moved if "img_in" in name]
    assert inputs and not any("img_in" in name for name in plain)
    change = moved[next(n for n in inputs if "up" in n)] @ moved[next(n for n in inputs if "down" in n)]
    assert change.abs().max() > 1e-4
    assert (tmp_path / "with/net_diffusers.safetensors").exists()


def test_an_idle_x_embedder_does_not_touch_the_lora(project, tmp_path):
    """Training x_embedder at a rate of 0 leaves it bit-identical, and its gradient out of nothing but the norm."""
    options = {"train_x_embedder": True, "x_embedder_lr": 0.0, "max_grad_norm": 0.0}
    assert project.train(output_dir=tmp_path / "idle", **options) == 0
    assert project.train(output_dir=tmp_path / "without", max_grad_norm=0.0) == 0
    idle, plain = (load_file(tmp_path / name / "net.safetensors") for name in ("idle", "without"))
    for name, tensor in plain.items():
        assert torch.equal(idle[name], tensor), name
    change = [idle[n].float() for n in sorted(idle) if "img_in" in n and "alpha" not in n]
    assert min(tensor.abs().max() for tensor in change) == 0.0


PROBE = """
import gc, sys, torch
torch.set_num_threads(1)
from library.training import loop
from library.start import run_command
from library import training
original = loop.Trainer.accumulate
seen = []
def spied(self, window):
    names = {type(o).__name__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)}
    seen.append((names, [m for m in ("transformers", "diffusers") if m in sys.modules]))
    return original(self, window)
loop.Trainer.accumulate = spied
code = run_command("train", training.run, sys.argv[1:])
names, modules = seen[-1]
bad = [n for n in names if "CLIP" in n or "T5" in n or "Encoder" in n or "Vae" in n or "Autoencoder" in n]
print("RESULT", code, len(seen), bad, modules, "FluxTransformer" in names)
"""


def test_no_text_encoder_and_no_vae_is_in_memory_while_training(project):
    """Nor are the libraries that have them even imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *project.words("out")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert result == ["RESULT 0 3 [] [] True"], done.stderr[-2000:]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "AdamW8bit"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        {"optimizer_type": "AdamWScheduleFree"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"full_bf16": True, "mixed_precision": "bf16"},
        {"use_ema": True},
        {"network_layout": "split"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_way_of_training_trains(project, tmp_path, options):
    """A finished run whose file holds a change that is finite and not zero."""
    assert project.train(**options) == 0
    tensors = load_file(tmp_path / "out/net.safetensors")
    ups = [tensor.float() for name, tensor in tensors.items() if "lora_up" in name]
    assert ups and all(torch.isfinite(up).all() for up in ups)
    assert max(up.abs().max() for up in ups) > 0
    assert all(line["loss"] < 1e3 for line in metrics(project) if "loss" in line)


def test_checkpointing_changes_nothing_but_memory(project, tmp_path):
    """Recomputed blocks give the same weights."""
    for name, on in (("a", False), ("b", True)):
        assert project.train(output_dir=tmp_path / name, gradient_checkpointing=on) == 0
    a, b = (load_file(tmp_path / name / "net.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_master_weights_are_float32_under_bf16(project, tmp_path):
    """At a rate where bfloat16 weights would stand still, every down-projection still moves."""
    options = {"mixed_precision": "bf16", "learning_rate": 1e-6, "save_precision": "float"}
    assert project.train(output_dir=tmp_path / "a", max_train_steps=2, **options) == 0
    assert project.train(output_dir=tmp_path / "b", max_train_steps=4, **options) == 0
    a, b = (load_file(tmp_path / name / "net.safetensors") for name in "ab")
    for name in a:
        if "weight" in name:
            assert a[name].dtype == torch.float32
            assert (a[name] != b[name]).float().mean() > 0.9, name


def test_what_the_device_cannot_do_is_said_before_anything_is_written(project, tmp_path, capsys):
    """The key is named, and no folder of a run is begun."""
    assert project.train(attention_backend="cudnn") == 2
    said = capsys.readouterr().err
    assert "attention_backend = cudnn does not work on the CPU" in said and "auto, flash, math" in said
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_loss_that_counts_nowhere_is_refused_or_said(project, tmp_path, capsys, caplog, monkeypatch):
    """A black mask and masked_loss = mask: zero at every step. A single item like that is named."""
    from library.training import objective

    nothing = {"masked_loss": "mask", "edit_mask_value": 0.0}
    assert project.train(**nothing) == 2
    assert "edit_mask_value = 0" in capsys.readouterr().err
    monkeypatch.setattr(objective, "loss_area", lambda kind, floor, batch: batch.changed[:, :1] * 0.0)
    assert project.train(masked_loss="changed", max_train_steps=6) == 0
    names = [message for message in caplog.messages if "teaches nothing" in message]
    assert len(names) == len(set(names)) == 7


def test_accumulation_equals_the_large_batch(base, tmp_path, monkeypatch):
    """One batch of seven, or seven in parts of three, three and one: the same weights after every step.

    The last window of an epoch is short where the parts do not fill it: it is averaged over what it holds.
    """
    from library.training.objective import Objective, Place

    original = Objective.losses  # every item draws what it draws in the first micro-step, wherever it stands
    monkeypatch.setattr(Objective, "losses", lambda s, predict, batch, _, device: original(
        s, predict, batch, Place(0), device))  # fmt: skip
    make_pairs(tmp_path)
    settings = {"enable_bucket": False, "optimizer_type": "SGD", "learning_rate": 5.0, "max_grad_norm": 0.0}
    project = Project(tmp_path, base, settings={**settings, "max_train_steps": 3, "lr_warmup_steps": 0}).cache()

    def trained(name: str, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
        keys = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert project.train(name, **keys) == 0
        return load_file(tmp_path / name / "net.safetensors")

    whole = trained("whole", 7, 1)
    moved = max(tensor.abs().max().item() for name, tensor in whole.items() if "up" in name)
    assert moved > 1e-3
    for name, batch, accumulation in (("parts", 3, 3), ("singles", 1, 7), ("short", 2, 100)):
        for key, tensor in trained(name, batch, accumulation).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=1e-5 * moved)
    other = trained("other", 3, 1)
    assert any((other[key] - whole[key]).abs().max() > 0.01 * moved for key in whole), "parts of it are not the whole"
