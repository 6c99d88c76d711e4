"""Being asked to stop, being refused a folder, NaN gradients, no memory: what is kept, and what the user is told."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from library.tensorfile import data_hash
from library.training import loop, objective, signals
from library.training.loss_scale import GROWTH_INTERVAL, LossScale
from library.training.metrics import Metrics
from library.training.run_folder import OWNER
from tests.training import forked

LONG = {"max_train_steps": 4000, "network_dim": 16}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_signals_save_and_the_run_continues(project, tmp_path, number, code):
    """Step finished, state and network saved, the exit code of the signal; the rest is as if nothing had happened."""
    out = tmp_path / "out"
    child = forked.start(lambda: project.train(**LONG, report_html=True))
    forked.until(lambda: forked.steps_done(out) >= 3, child)
    os.kill(child, number)
    assert forked.wait(child) == code
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}[number]
    assert f'"stopped by {name}' in (out / "report.html").read_text(encoding="utf-8")
    saved = sorted(path.name for path in out.glob("net-step*") if "_workflow" not in path.name)
    step = forked.steps_done(out)
    assert saved == [f"net-step{step:08d}-state", f"net-step{step:08d}.safetensors"]
    assert not (out / OWNER).exists()
    options = {**LONG, "max_train_steps": step + 3}
    assert forked.finish(project, out, **options) == 0
    assert forked.finish(project, tmp_path / "whole", **options) == 0
    assert data_hash(out / "net.safetensors") == data_hash(tmp_path / "whole/net.safetensors")


def test_a_second_ctrl_c_leaves_at_once(project, tmp_path):
    """Without damage: the next run works."""
    out = tmp_path / "out"
    child = forked.start(lambda: project.train(**LONG))
    forked.until(lambda: forked.steps_done(out) >= 2, child)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGINT)
    assert forked.wait(child) == 130
    assert forked.finish(project, out, **{**LONG, "max_train_steps": forked.steps_done(out) + 1}) == 0


def test_a_stop_file_stops_and_is_removed(project, tmp_path):
    """For machines where no signal can be sent."""
    out = tmp_path / "out"
    child = forked.start(lambda: project.train(**LONG))
    forked.until(lambda: forked.steps_done(out) >= 2, child)
    (out / signals.STOP_FILE).touch()
    assert forked.wait(child) == 130
    assert not (out / signals.STOP_FILE).exists()
    assert len(list(out.glob("net-step*-state"))) == 1
    (out / signals.STOP_FILE).touch()  # left over: it was meant for a run that is no more
    assert forked.finish(project, out, **{**LONG, "max_train_steps": forked.steps_done(out) + 3}) == 0
    assert not (out / signals.STOP_FILE).exists()


def test_metrics_are_json_whatever_was_measured(tmp_path):
    """Python writes NaN and Infinity, which no other reader of JSON takes."""
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 1.5, "gradient_norm": float("nan"), "validation_psnr": float("inf")})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.5}


def test_a_second_trainer_is_refused_and_the_lock_dies_with_its_owner(project, tmp_path, capsys):
    """The message names the process; after kill -9 the folder is free at once."""
    out = tmp_path / "out"
    child = forked.start(lambda: project.train(**LONG))
    forked.until(lambda: forked.steps_done(out) >= 1, child)
    assert project.train(**LONG) == 2
    error = capsys.readouterr().err
    assert f"process {child} on" in error and "started" in error
    os.kill(child, signal.SIGKILL)
    forked.wait(child)
    assert project.train(**{**LONG, "max_train_steps": 3}) == 0


def poisoned(monkeypatch, micro_steps: set[int], value: float = float("nan")) -> None:
    """Make the loss of some micro-steps not finite."""
    original = objective.Objective.losses

    def losses(self, predict, batch, place, device):
        found = original(self, predict, batch, place, device)
        return found * value if place.micro_step in micro_steps else found

    monkeypatch.setattr(objective.Objective, "losses", losses)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["AdamW", "Prodigy", "AdamW8bit"])
def test_a_nan_step_is_left_out_before_the_optimizer(project, tmp_path, monkeypatch, caplog, value, optimizer):
    """The weights after the bad step are bit-equal to those before it; the batch is named; training goes on."""
    poisoned(monkeypatch, {2}, value)
    seen = []
    original = loop.Trainer.update

    def spied(self, window, loss):
        before = [p.detach().clone() for p in self.parameters]
        result = original(self, window, loss)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, self.parameters, strict=True)))
        return result

    monkeypatch.setattr(loop.Trainer, "update", spied)
    assert project.train(max_train_steps=5, optimizer_type=optimizer, lr_warmup_steps=0) == 0
    assert seen == [False, False, True, False, False]
    assert "step 3 left out" in caplog.text and "items: " in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert "loss" not in lines[2]


def test_too_many_nan_steps_in_a_row_end_the_run(project, tmp_path, monkeypatch, capsys):
    """Exit code 3, advice, and the state of before."""
    poisoned(monkeypatch, {1, 3, 4, 5})
    assert project.train(max_train_steps=9, save_every_n_steps=2) == 3
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "learning_rate" in error
    assert (tmp_path / "out/net-step00000004-state").exists()
    assert not (tmp_path / "out/net.safetensors").exists()
    monkeypatch.undo()
    assert project.train(max_train_steps=9, save_every_n_steps=2) == 0


def test_too_many_nan_steps_keep_what_was_learnt(project, tmp_path, monkeypatch, capsys):
    """The state of before the bad steps is saved whether or not a save was due; the same command goes on from it."""
    poisoned(monkeypatch, {4, 5, 6, 7, 8})
    assert project.train(max_train_steps=10) == 3
    out, error = tmp_path / "out", capsys.readouterr().err
    kept = out / "net-step00000006-state"
    assert str(kept) in error and (out / "net-step00000006.safetensors").exists()
    assert project.train(max_train_steps=10) == 3, "as many tries again, further on"
    assert f"--resume {kept}" in capsys.readouterr().err
    monkeypatch.undo()
    assert project.train(max_train_steps=10) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines][3:] == [
        (4, 0), (5, 1), (6, 2), (7, 4), (8, 5), (9, 6), (10, 6),
    ]  # fmt: skip


def test_a_run_that_was_never_finite_binds_nothing(project, tmp_path, monkeypatch, capsys):
    """No good step: no state of it is left, and whatever is at fault may be changed."""
    poisoned(monkeypatch, set(range(20)))
    assert project.train(max_train_steps=9) == 3
    assert "any key may change" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("net*"))
    monkeypatch.undo()
    assert project.train(max_train_steps=2, network_dim=8) == 0


def test_an_overflow_under_loss_scaling_only_lowers_the_scale(project, tmp_path, monkeypatch):
    """fp16 may overflow by design; that is no NaN of the run."""
    poisoned(monkeypatch, {0, 1, 2, 3}, float("inf"))
    assert project.train(max_train_steps=6, mixed_precision="fp16") == 0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 6


def test_the_loss_scale_comes_back_and_overflows_are_counted(project, tmp_path, monkeypatch):
    """From its floor it grows again as torch's GradScaler does; overflows are apart from steps at fault."""
    scale = LossScale.for_precision("fp16")
    for _ in range(40):
        scale.after(False)
    assert scale.value == 1.0 and not scale.can_fall
    for _ in range(2 * GROWTH_INTERVAL):
        scale.after(True)
    assert scale.value == 4.0
    poisoned(monkeypatch, {1, 2}, float("inf"))
    assert project.train(max_train_steps=4, mixed_precision="fp16") == 0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["overflows"] for line in lines] == [0, 1, 2, 2]
    assert [line["loss_scale"] for line in lines] == [65536, 32768, 16384, 16384]


@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_out_of_memory_is_explained(project, tmp_path, monkeypatch, capsys, place):
    """The bucket and the next knob; the state is saved where the weights are whole; exit code 4."""
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return originals[place](*arguments, **options)

    originals = {
        "forward": objective.Objective.losses,
        "backward": torch.Tensor.backward,
        "step": torch.optim.AdamW.step,
    }
    owners = {"forward": objective.Objective, "backward": torch.Tensor, "step": torch.optim.AdamW}
    names = {"forward": "losses", "backward": "backward", "step": "step"}
    monkeypatch.setattr(owners[place], names[place], full)
    assert project.train(max_train_steps=9) == 4
    error = capsys.readouterr().err
    assert "64 x 64" in error or "80 x 48" in error
    assert "gradient_checkpointing = true" in error
    states = list(Path(tmp_path / "out").glob("*-state"))
    assert bool(states) == (place != "step")
    monkeypatch.undo()
    assert project.train(max_train_steps=9) == 0


def test_a_read_only_folder_is_found_before_any_model_is_loaded(project, tmp_path, monkeypatch, capsys):
    """A file where the folder should be stands for every folder that cannot be written, for root as well."""
    (tmp_path / "blocked").write_text("")
    from library.models import setup

    monkeypatch.setattr(setup, "load", lambda *_: pytest.fail("weights were loaded"))
    assert project.train(output_dir=tmp_path / "blocked" / "out") == 5
    assert "blocked" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_keeps_the_last_state(project, tmp_path):
    """A limit on the size of files stands for a full disk: exit code 5, nothing half written, and the run goes on."""
    options = {"network_dim": 32, "max_train_steps": 6, "save_every_n_steps": 2}
    out = tmp_path / "out"

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        return project.train(**options)

    assert forked.finish(project, out, **{**options, "max_train_steps": 3}) == 0
    before = sorted(path.name for path in out.iterdir())
    assert forked.wait(forked.start(limited)) == 5
    assert [name for name in before if name not in {path.name for path in out.iterdir()}] == []
    assert not [path.name for path in out.iterdir() if "influx-tmp" in path.name]
    assert forked.finish(project, out, **options) == 0
    assert forked.finish(project, tmp_path / "whole", **options) == 0
    assert data_hash(out / "net.safetensors") == data_hash(tmp_path / "whole/net.safetensors")


@pytest.mark.parametrize("options", [{}, {"save_every_n_steps": 2}, {"save_every_n_steps": 2, "save_state": False}])
def test_a_network_that_cannot_be_saved_costs_no_step(project, tmp_path, monkeypatch, capsys, options):
    """The state is there whatever refused the network; the same command, mended, ends as if nothing had happened."""
    from library.errors import NetworkFileError
    from library.training import keeper

    def refused(*arguments, **more):
        raise NetworkFileError("this format cannot carry it")

    out, step = tmp_path / "out", options.get("save_every_n_steps", 3)
    with monkeypatch.context() as broken:
        broken.setattr(keeper, "save_network", refused)
        assert project.train(**options) == 2
    assert "cannot carry it" in capsys.readouterr().err
    assert (out / f"net-step{step:08d}-state" / "manifest.json").exists()
    assert project.train(**options) == 0
    assert project.train(output_dir=tmp_path / "whole", **options) == 0
    assert data_hash(out / "net.safetensors") == data_hash(tmp_path / "whole/net.safetensors")


def test_a_state_that_holds_nan_is_not_left_as_the_newest(project, tmp_path, monkeypatch):
    """Weights that went bad are refused by the file; a state of them would be continued from."""
    from library.training.loop import Trainer

    original = Trainer.update

    def spoilt(self, window, loss):
        done = original(self, window, loss)
        if self.trained.progress.step == 1:
            self.parameters[0].data.fill_(float("nan"))
        return done

    monkeypatch.setattr(Trainer, "update", spoilt)
    assert project.train(save_every_n_steps=1, max_train_steps=2) != 0
    assert [path.name for path in (tmp_path / "out").glob("*-state")] == ["net-step00000001-state"]


def test_a_run_that_finished_no_step_does_not_lock_its_folder(project, tmp_path, monkeypatch, capsys):
    """What the advice after a failed first step says to change may be changed; after a step it may not."""

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as crowded:
        crowded.setattr(objective.Objective, "losses", full)
        assert project.train(network_dim=8) == 4
    assert project.train(network_dim=4) == 0
    assert project.train(network_dim=2) == 2
    assert "network_dim: 4 -> 2" in capsys.readouterr().err
