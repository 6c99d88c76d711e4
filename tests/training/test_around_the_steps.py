"""Previews, measurements, best and early stop, saving rules, the report and the plan, on real runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.data.cached import open_cache
from library.training import saving
from library.training.saving import Moment
from library.training.validation import gain
from tests.training.project import Project
from tests.training.test_report import browse, needs_chromium

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def measured(cached, tmp_path_factory) -> Project:
    """A project with held-out items and two previews."""
    root = tmp_path_factory.mktemp("measured")
    for name in ("source", "target"):
        (root / name).symlink_to(cached.root / name)
    settings = {
        "validation_prompt": "make it red;make it blue",
        "validation_image": cached.root / "source" / "0.png",
        "validation_width": 64,
        "validation_height": 64,
        "sample_steps": 2,
    }
    return Project(root, cached.base, held_out=0.3, settings=settings).cache()


def numbers(folder: Path, name: str) -> dict[int, float]:
    """One metric by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_a_run_that_shows_how_it_goes(measured, tmp_path):
    """Previews at the start, every two steps and at the end; held-out loss by area; pictures scored and kept."""
    out = tmp_path / "out"
    assert measured.train(
        output_dir=out, max_train_steps=5, sample_at_first=True, sample_every_n_steps=2, validate_every_n_steps=2,
        validation_generate=2, report_html=True,
    ) == 0  # fmt: skip
    previews = sorted(int(path.stem[-8:]) for path in (out / "sample").glob("net_00_0*.png"))
    assert previews == [0, 2, 4, 5]
    for name in ("validation_loss", "validation_loss_changed", "validation_loss_unchanged", "validation_psnr",
                 "validation_ssim", "validation_colour_distance"):  # fmt: skip
        assert sorted(numbers(out, name)) == [2, 4, 5], name
    whole, changed, kept = (numbers(out, f"validation_loss{area}")[2] for area in ("", "_changed", "_unchanged"))
    assert min(changed, kept) < whole < max(changed, kept)
    for ending in ("source", "target", "00000004"):
        assert (out / "sample" / f"net_val00_{ending}.png").exists()
    with Image.open(out / "sample/net_00_00000004.png") as image:
        assert "make it red" in json.dumps(image.info)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "make it blue" in page and '"finished"' in page


def test_previews_and_measurements_do_not_touch_the_run(measured, tmp_path):
    """The same network, whether anything is looked at or not."""
    looking = {"sample_every_n_steps": 1, "validate_every_n_steps": 1, "validation_generate": 1}
    for name, options in (("a", looking), ("b", {"validate_every_n_steps": 100})):
        options = {"optimizer_type": "AdamWScheduleFree", "network_dropout": 0.2, "use_ema": True, **options}
        assert measured.train(output_dir=tmp_path / name, **options) == 0
    for file in ("net.safetensors", "net-ema.safetensors"):
        a, b = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert all(torch.equal(a[name], b[name]) for name in a), file


def test_measurements_are_repeatable_and_move_with_the_network(measured, tmp_path):
    """Fixed noise, fixed timesteps: two runs measure alike; a rate of nearly zero measures nearly alike twice."""
    options = {"max_train_steps": 4, "validate_every_n_steps": 1, "max_validation_steps": 1}
    assert measured.train(output_dir=tmp_path / "a", learning_rate=1e-9, **options) == 0
    assert measured.train(output_dir=tmp_path / "b", learning_rate=1e-2, **options) == 0
    still, moving = numbers(tmp_path / "a", "validation_loss"), numbers(tmp_path / "b", "validation_loss")
    assert max(still.values()) - min(still.values()) < 1e-4
    assert moving[1] != moving[4] and moving[4] < still[4]


def test_the_best_network_is_kept_and_patience_ends_the_run(measured, tmp_path, caplog, monkeypatch):
    """The loss falls twice, then rises: the copy is that of the second measurement, and the run stops at the fourth."""
    from library.training import equipment

    losses = iter([3.0, 2.0, 2.5, 2.1, 2.2, 2.2])
    monkeypatch.setattr(equipment, "measure", lambda *_: {"validation_loss": next(losses)})
    out = tmp_path / "out"
    assert measured.train(
        output_dir=out, max_train_steps=6, validate_every_n_steps=1, save_best=True, early_stop_patience=2,
        save_every_n_steps=2,
    ) == 0  # fmt: skip
    assert sorted(numbers(out, "validation_loss")) == [1, 2, 3, 4]
    assert "stopping early" in caplog.text
    best, second = load_file(out / "net-best.safetensors"), load_file(out / "net-step00000002.safetensors")
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert (out / "net.safetensors").exists()


@pytest.mark.parametrize("keys", [{"sample_every_n_steps": 1}, {"validate_every_n_steps": 1, "validation_generate": 2}])
def test_a_run_asked_to_stop_while_it_paints_stops_painting(measured, tmp_path, monkeypatch, keys):
    """The step's state is saved, and the picture is left where it stands."""
    from library import previews
    from library.training import pictures

    steps = []

    def interrupted(original):
        def painting(*arguments, progress, **options):
            def counted(step):
                steps.append(step)
                if len(steps) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                progress(step)

            return original(*arguments, progress=counted, **options)

        return painting

    for module in (previews, pictures):
        monkeypatch.setattr(module, "sample", interrupted(module.sample))
    keys = {"sample_steps": 9, "max_train_steps": 4, "validate_every_n_steps": 100, **keys}
    assert measured.train(output_dir=tmp_path / "out", **keys) == 143
    assert steps == [1, 2]
    assert [path.name for path in (tmp_path / "out").glob("*-state")] == ["net-step00000001-state"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_stopped_early_is_finished(measured, tmp_path, caplog, monkeypatch, killed):
    """The same command says so, as does one with more steps; more patience goes on from the end's state."""
    from library.training import equipment

    monkeypatch.setattr(equipment, "measure", lambda *_: {"validation_loss": next(losses)})
    out, losses = tmp_path / "out", iter([2.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    options = {"output_dir": out, "max_train_steps": 6, "validate_every_n_steps": 1}
    assert measured.train(**options, early_stop_patience=2) == 0
    assert (out / "net-state/manifest.json").exists()
    record, trained = out / "run.json", (out / "net.safetensors").read_bytes()
    if killed:  # between the last state and the end
        record.write_text(json.dumps({**json.loads(record.read_text()), "finished_steps": None, "stopped_early": None}))
        (out / "net.safetensors").unlink()
        assert measured.train(**options, early_stop_patience=2) == 0
    else:
        assert measured.train(**options | {"max_train_steps": 9}, early_stop_patience=2) == 0
        assert "stopped early after 3 steps: nothing is left to do" in caplog.text
        assert (out / "net.safetensors").read_bytes() == trained
    assert json.loads(record.read_text())["finished_steps"] == 3
    assert sorted(numbers(out, "validation_loss")) == [1, 2, 3]
    assert measured.train(**options, early_stop_patience=4) == 0
    assert sorted(numbers(out, "validation_loss")) == [1, 2, 3, 4, 5, 6]


def test_a_measurement_without_its_metric_ends_nothing(measured, tmp_path, capsys, monkeypatch):
    """A metric that no measurement can have is an error; one that this measurement lacks is no missing gain."""
    from library.training.pictures import Painter

    options = {"best_metric": "psnr", "max_train_steps": 4, "validate_every_n_steps": 1}
    for asks in ({"save_best": True}, {"early_stop_patience": 2}):
        assert measured.train(output_dir=tmp_path / "no", **options, **asks) == 2
        assert "validation_generate" in capsys.readouterr().err
    monkeypatch.setattr(Painter, "score", lambda *_: {})  # as without memory for the pictures
    out = tmp_path / "out"
    assert measured.train(output_dir=out, **options, early_stop_patience=2, validation_generate=1) == 0
    assert sorted(numbers(out, "validation_loss")) == [1, 2, 3, 4]


def test_gain_knows_which_way_is_better():
    """Small losses, large signal-to-noise ratios."""
    values = {"validation_loss": 0.4, "validation_psnr": 20.0, "validation_colour_distance": 0.2}
    assert gain("loss", values, None) == 0.4
    assert gain("loss", values, 0.4) is None and gain("loss", values, 0.5) == 0.4
    assert gain("psnr", values, 21.0) is None and gain("psnr", values, 19.0) == 20.0
    assert gain("colour_distance", values, 0.1) is None
    assert gain("ssim", values, None) is None


def test_memory_running_out_in_a_preview_ends_nothing(measured, tmp_path, monkeypatch, caplog):
    """The preview is left out, the run goes on."""
    from library import previews

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(previews, "sample", full)
    assert measured.train(output_dir=tmp_path / "out", sample_every_n_steps=1) == 0
    assert "left out" in caplog.text


def test_memory_running_out_while_scoring_ends_nothing(measured, tmp_path, monkeypatch, caplog):
    """The same for held-out pictures."""
    from library.training import pictures

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pictures, "sample", full)
    assert measured.train(output_dir=tmp_path / "out", validate_every_n_steps=1, validation_generate=1) == 0
    assert "not scored" in caplog.text


def test_memory_running_out_in_the_vae_ends_nothing(measured, tmp_path, monkeypatch, caplog):
    """Neither a preview's decoding nor that of a held-out picture, with tiles or without, takes a run's result away."""
    from diffusers.models.autoencoders.vae import Decoder

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "forward", full)
    settings = {"sample_every_n_steps": 1, "validate_every_n_steps": 1, "validation_generate": 1}
    assert measured.train(output_dir=tmp_path / "out", **settings) == 0
    assert "previews are left out" in caplog.text and "not scored" in caplog.text
    assert (tmp_path / "out" / "net.safetensors").exists()


def test_what_is_due_is_saved_before_anything_is_painted(measured, tmp_path, monkeypatch):
    """An error while painting, whatever it is, finds the step's network and state on the disk."""
    from library.previews import Previews

    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(Previews, "make", broken)
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        measured.train(output_dir=out, max_train_steps=4, sample_every_n_steps=2, save_every_n_steps=2)
    assert (out / "net-step00000002.safetensors").exists() and (out / "net-step00000002-state").is_dir()
    with pytest.raises(ZeroDivisionError):
        measured.train(output_dir=tmp_path / "end", max_train_steps=2)
    assert (tmp_path / "end" / "net.safetensors").exists()


def test_names_and_removal_are_those_of_kohya(project, tmp_path):
    """Step and epoch names; what save_last_n_* keeps; states by their own counts."""
    assert project.train(
        max_train_steps=9, save_every_n_steps=2, save_last_n_steps=4, save_last_n_steps_state=2, save_every_n_epochs=1,
        save_last_n_epochs=1,
    ) == 0  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "out").glob("net*"))
    workflows = {name.removesuffix("_api.json").removesuffix(".json") for name in names if "_workflow" in name}
    assert workflows <= {f"{name.removesuffix('.safetensors')}_workflow" for name in names}, "none outlives its network"
    assert [name for name in names if "_workflow" not in name] == [
        "net-000002-state", "net-000002.safetensors", "net-state",
        "net-step00000004.safetensors", "net-step00000006-state", "net-step00000006.safetensors",
        "net-step00000008-state", "net-step00000008.safetensors", "net.safetensors",
    ]  # fmt: skip


def test_a_limit_on_states(project, tmp_path):
    """checkpoints_total_limit counts states and leaves networks alone."""
    assert project.train(max_train_steps=7, save_every_n_steps=1, checkpoints_total_limit=2) == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*-state")) == ["net-state", "net-step00000006-state"]
    assert len(list(out.glob("net-step*.safetensors"))) == 6


def test_nothing_is_due_at_the_last_step_but_what_was_asked_for(project):
    """The last network has the plain name."""
    table = project.run(save_every_n_steps=2, save_state_on_train_end=True).saving
    assert [plan.stem for plan in saving.due(table, "n", Moment(4, 1, True, False))] == ["n-step00000004"]
    assert saving.due(table, "n", Moment(4, 1, True, True)) == [saving.SavePlan(None, True)]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"mixed_precision": "bf16"}, torch.bfloat16),
        ({"mixed_precision": "bf16", "upcast_before_saving": True}, torch.float32),
        ({"save_precision": "fp16"}, torch.float16),
    ],
)
def test_the_precision_of_the_file(project, tmp_path, options, dtype):
    """As trained, unless asked otherwise."""
    assert project.train(max_train_steps=1, **options) == 0
    tensors = load_file(tmp_path / "out/net.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "weight" in name} == {dtype}


def test_two_rates_and_scaling(project, tmp_path):
    """unet_lr, x_embedder_lr, a rate by pattern, LoRA+, and scale_lr, as the metrics tell them."""
    assert project.train(
        max_train_steps=1, gradient_accumulation_steps=3, scale_lr=True, unet_lr=1e-3, x_embedder_lr=1e-4,
        train_x_embedder=True, loraplus_lr_ratio=2.0, network_reg_lrs="single_blocks=5e-4",
    ) == 0  # fmt: skip
    rates = {k: round(v, 9) for k, v in json.loads((tmp_path / "out/metrics.jsonl").read_text()).items() if "lr/" in k}
    assert rates == {
        "lr/transformer": 6e-3, "lr/transformer_up": 1.2e-2, "lr/x_embedder": 6e-4,
        "lr/transformer_0.0005": 3e-3, "lr/transformer_0.0005_up": 6e-3,
    }  # fmt: skip


PLAN = "import sys\nfrom library.start import run_command\nfrom library import training\n" + (
    "code = run_command('train', training.run, sys.argv[1:])\nprint('TORCH', 'torch' in sys.modules, code)"
)


def test_the_plan_needs_no_torch_and_counts_what_training_counts(project, tmp_path):
    """Items, pairs, buckets, steps, saves, previews, changed keys with their places; nothing is written."""
    words = project.words("x", dry_run=True, gradient_accumulation_steps=3, max_train_steps=500, save_every_n_steps=200)
    done = subprocess.run([sys.executable, "-c", PLAN, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "TORCH False 0" in done.stdout, done.stdout + done.stderr
    assert "items: 7 (7 edit), 7 of them pairs; 0 held out" in done.stdout
    assert "bucket 64 x 64: 4 items, 2 batches of up to 2" in done.stdout
    assert "4 batches an epoch, 2 steps an epoch, 500 steps in all (250.0 epochs)" in done.stdout
    assert "net-step00000200, net-step00000400 with a state beside each" in done.stdout
    assert "learning_rate = 0.001  (--learning_rate)" in done.stdout
    assert "run.toml:3)" in done.stdout
    assert not (tmp_path / "out").exists()
    assert project.train(max_train_steps=2, gradient_accumulation_steps=3) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]


def test_the_density_is_shown(project, tmp_path, capsys):
    """As text and as a picture, without training."""
    assert project.train(show_timesteps=True, weighting_scheme="logit_normal", logit_mean=1.5) == 0
    printed = capsys.readouterr().out
    shares = [float(line.split()[1].rstrip("%")) for line in printed.splitlines() if line[:1].isdigit()]
    assert len(shares) == 20 and sum(shares) == pytest.approx(100, abs=0.3)
    assert sum(shares[:10]) > 85, "a large u is little noise, as in diffusers"
    with Image.open(tmp_path / "out/timesteps.png") as image:
        assert image.width > 300
    assert project.train(list_modules=True) == 0
    assert "double_blocks.0.img_attn.qkv" in capsys.readouterr().out


@needs_chromium
def test_the_report_of_a_real_run_in_a_browser(measured, tmp_path):
    """Curves, preview rows with sources, held-out columns with targets, settings; no error on the console."""
    out = tmp_path / "out"
    assert measured.train(
        output_dir=out, max_train_steps=4, sample_every_n_steps=2, validate_every_n_steps=2, validation_generate=1,
        report_html=True,
    ) == 0  # fmt: skip
    dom, console = browse(out / "report.html", "#slider=20&changed=1", "--dump-dom")
    shutil.rmtree(out / "profile", ignore_errors=True)
    assert console == ""
    assert 'data-ready="yes"' in dom
    for text in ("step 4 of 4", "finished", "<h3>Loss</h3>", "<h3>Validation loss</h3>", "<th>source</th>",
                 "<th>target</th>", "<th>step 2</th>", "<th>step 4</th>", "inset(0px 80% 0px 0px)"):  # fmt: skip
        assert text in dom, text


def test_items_of_the_data_are_previews_without_any_prompt(cached, tmp_path, caplog):
    """Source, target and caption of the items themselves, held-out ones first; nothing more is cached for it."""
    project = Project(cached.root, cached.base, held_out=0.3)
    out = tmp_path / "out"
    assert project.train(output_dir=out, sample_items=3, sample_every_n_steps=2, sample_steps=2) == 0
    files = {path.name for path in (out / "sample").iterdir()}
    assert files == {
        f"net_{number:02d}_{what}.png" for number in range(3) for what in ("source", "target", "00000002", "00000003")
    }
    dataset = open_cache(project.run(sample_items=3))
    held_out = {dataset.manifest.texts[item.texts[0]].caption for item in dataset.held_out_items}
    prompts = [preview.request.prompt for preview in dataset.previews]
    assert len(held_out) == 2 and set(prompts[:2]) == held_out and prompts[2] not in held_out
    pictures = {what: pixels(out / f"sample/net_00_{what}.png") for what in ("source", "target", "00000003")}
    assert abs(pictures["source"] - pictures["target"]).mean() > 1, "the target is another picture"
    with Image.open(out / "previews.png") as with_target:
        assert with_target.width == 90 + 3 * 260
        height = with_target.height
    assert height > 4 * 160, "rows: source, target and two steps"
    assert "does nothing" not in caplog.text
    dataset.close()


def test_held_out_pictures_say_how_they_were_made(measured, tmp_path):
    """As previews do."""
    out = tmp_path / "out"
    assert measured.train(output_dir=out, max_train_steps=1, validation_generate=2) == 0
    for number in range(2):
        with Image.open(out / f"sample/net_val{number:02d}_00000001.png") as image:
            said = json.loads(image.info["influx"])
        assert (said["steps"], said["guidance"], said["training step"], said["mode"]) == (2, 3.5, 1, "edit")
        assert said["size"] in ("64x64", "80x48") and said["seed"] >= 7 and said["item"].startswith("source/")


def test_a_prompt_on_the_first_item_has_its_target_if_it_is_the_items_own(cached, tmp_path):
    """Another prompt asks for something that the data has no answer to."""
    settings = {"validation_prompt": "make it red;make it purple", "validation_width": 64, "sample_steps": 1}
    (tmp_path / "source").symlink_to(cached.root / "source")
    (tmp_path / "target").symlink_to(cached.root / "target")
    project = Project(tmp_path, cached.base, settings=settings).cache()
    assert project.train("out", max_train_steps=1) == 0
    sample = tmp_path / "out/sample"
    assert (sample / "net_00_target.png").is_file() and not (sample / "net_01_target.png").exists()


def test_the_plan_says_which_previews_are_made(cached, capsys):
    """And when."""
    project = Project(cached.root, cached.base, held_out=0.3)
    for keys, said in (
        ({}, "previews: none (no sample_prompts, no validation_prompt, no sample_items)"),
        ({"sample_items": 2}, "previews: 2 (2 of the data's own items), every 50 steps, at the end"),
        ({"sample_items": 99, "sample_every_n_epochs": 2, "sample_at_first": True, "sample_at_end": False},
         "previews: 7 (7 of the data's own items), every 2 epochs, at the start"),
    ):  # fmt: skip
        assert project.train("x", dry_run=True, **keys) == 0
        assert said in capsys.readouterr().out.splitlines()


def pixels(path):
    """A picture as numbers."""
    with Image.open(path) as image:
        return numpy.asarray(image, dtype=float)
