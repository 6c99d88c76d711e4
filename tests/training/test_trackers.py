"""Every tracker gets the numbers and pictures; a missing one is an error before training."""

import importlib.util
import sys
import types

import numpy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.config.tables import LoggingTable
from library.errors import ConfigError
from library.training import trackers


class Recorder(types.ModuleType):
    """A stand-in for a tracker's package: remembers every call."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple] = []

    def _note(self, *call):
        self.calls.append(call)
        return self

    def init(self, **options):
        return self._note("init", options)

    def log(self, values, step=None):
        return self._note("log", values, step)

    def finish(self):
        return self._note("finish")

    def Image(self, pixels):
        return ("picture", pixels.shape)

    def Experiment(self, **options):
        return self._note("init", options)

    def set_name(self, name):
        return self._note("name", name)

    def log_parameters(self, settings):
        return self._note("settings", settings)

    def log_metrics(self, values, step):
        return self._note("log", values, step)

    def log_image(self, pixels, name, step):
        return self._note("log", {name: ("picture", pixels.shape)}, step)

    def end(self):
        return self._note("finish")


def installed(monkeypatch, *names: str) -> None:
    """Pretend that these trackers' packages, and those of no others, can be imported."""
    found, find = {trackers.PACKAGES[name] for name in names}, importlib.util.find_spec
    trackers_own = set(trackers.PACKAGES.values())
    pretend = lambda name, *rest: (object() if name in found else None) if name in trackers_own else find(name, *rest)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", pretend)


@pytest.mark.parametrize("name", ["wandb", "comet_ml", "trackio"])
def test_an_extra_tracker_gets_everything(name, monkeypatch, tmp_path):
    """Project and run name, settings, numbers by step, pictures, and an end."""
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    installed(monkeypatch, name)
    table = LoggingTable(report_to=(name,), log_tracker_name="mine", wandb_run_name="one", wandb_api_key=None)
    (tracker,) = trackers.build(table, tmp_path, "net", {"rank": "4"}, 0, "f00d")
    tracker.numbers(3, {"loss/current": 0.5})
    tracker.picture(3, "net_00", numpy.zeros((8, 6, 3), dtype=numpy.uint8))
    tracker.close()
    assert "mine" in str(recorder.calls) and "one" in str(recorder.calls) and "rank" in str(recorder.calls)
    assert ("log", {"loss/current": 0.5}, 3) in recorder.calls
    assert ("log", {"net_00": ("picture", (8, 6, 3))}, 3) in recorder.calls
    assert recorder.calls[-1] == ("finish",)


def test_tensorboard_shows_kohyas_tags_once_per_step(tmp_path):
    """A continued run replaces the steps it does again."""
    for start, stop in ((0, 5), (3, 6)):
        tracker = trackers.TensorBoard(tmp_path, start)
        for step in range(start + 1, stop + 1):
            tracker.numbers(step, {"loss/current": float(step + start)})
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 7.0), (5, 8.0), (6, 9.0),
    ]  # fmt: skip


def test_names_are_checked_before_training(monkeypatch):
    """A tracker that is asked for by name must be there; `all` takes what is; `none` nothing."""
    installed(monkeypatch, "tensorboard")
    assert trackers.wanted(("all",)) == ["tensorboard"]
    assert trackers.wanted(("none",)) == []
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers.wanted(("wandb",))


def test_a_terminal_that_is_gone_does_not_end_a_run(project, monkeypatch, tmp_path):
    """`| head`, a closed window, a full log disk."""
    from library.training import logbook, metrics

    def gone(*arguments, **options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(logbook.tqdm, "update", gone)
    original = metrics.Metrics.__init__

    def on_a_full_disk(self, folder, step):
        original(self, folder, step)
        self._file.close()
        self._file = open("/dev/full", "w", encoding="utf-8")

    monkeypatch.setattr(metrics.Metrics, "__init__", on_a_full_disk)
    monkeypatch.setattr(metrics.Metrics, "close", lambda self: None)
    assert project.train() == 0
    assert (tmp_path / "out/net.safetensors").exists()


def test_a_continued_run_goes_on_as_the_same_run_of_wandb(project, monkeypatch):
    """Under one id, which another run does not have."""
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    installed(monkeypatch, "wandb")
    options = {"report_to": "wandb", "save_state_on_train_end": True}
    assert project.train(max_train_steps=1, **options) == 0
    assert project.train(max_train_steps=2, **options) == 0
    assert (
        project.train(max_train_steps=1, output_dir=project.settings["output_dir"] / "other", network_dim=2, **options)
        == 0
    )
    first, again, other = (call[1] for call in recorder.calls if call[0] == "init")
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"


def test_previews_keep_their_name_from_step_to_step(project, tmp_path):
    """So that a tracker shows one picture with a slider, not one card for each step."""
    options = {"sample_items": 1, "sample_steps": 1, "sample_every_n_steps": 1, "sample_at_end": False}
    assert project.train(max_train_steps=3, report_to="tensorboard", **options) == 0
    events = EventAccumulator(str(tmp_path / "out/logs/net"), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["net_00"]
    assert [event.step for event in events.Images("net_00")] == [1, 2]
