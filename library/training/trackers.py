"""Where numbers and pictures of a run are shown: TensorBoard by default; wandb, comet and trackio when installed."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Protocol

import numpy

from library.config.tables import LoggingTable
from library.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml", "trackio": "trackio"}
DEFAULT_PROJECT = "influx"


class Tracker(Protocol):
    """What a tracker can do. `step` counts optimizer steps."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Show numbers; names are grouped by what stands before the first slash."""

    def picture(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        """Show one picture, (H, W, 3) of bytes."""

    def close(self) -> None:
        """Write what is left."""


def wanted(names: tuple[str, ...]) -> list[str]:
    """The trackers to use. Raises ConfigError for one that is asked for by name and not installed."""
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    if "all" in names:
        return installed
    chosen = [name for name in names if name != "none"]
    for name in chosen:
        if name not in installed:
            raise ConfigError(f"report_to = {name!r}, but it is not installed: pip install {PACKAGES[name]}")
    return chosen


def run_id(*facts: object) -> str:
    """A tracker's name for a run, made of what stays the same when it is continued."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def build(
    table: LoggingTable, folder: Path, run_name: str, settings: dict, from_step: int, identity: str
) -> list[Tracker]:
    """Open every wanted tracker. `settings` are shown beside the numbers, where the tracker can. identity: the same
    when the run is continued (see `run_id`)."""
    project = table.log_tracker_name or DEFAULT_PROJECT
    name = table.wandb_run_name or run_name
    logs = folder / table.logging_dir / f"{table.log_prefix or ''}{run_name}"
    made: list[Tracker] = []
    for kind in wanted(table.report_to):
        if kind == "tensorboard":
            made.append(TensorBoard(logs, from_step))
        elif kind == "wandb":
            made.append(Wandb(project, name, settings, folder, table.wandb_api_key, identity))
        elif kind == "comet_ml":
            made.append(Comet(project, name, settings))
        else:
            made.append(Trackio(project, name, settings))
    return made


class TensorBoard:
    """Event files below `logging_dir`. Opened at the step to continue from, so that redone steps replace their like."""

    def __init__(self, folder: Path, from_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; a run that is continued goes on under its own id."""

    def __init__(self, project: str, name: str, settings: dict, folder: Path, api_key: str | None, identity: str):
        import wandb

        if api_key:
            os.environ.setdefault("WANDB_API_KEY", api_key)
        self.wandb = wandb
        self.run = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(folder),
            config=settings, allow_val_change=True,
        )  # fmt: skip

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Comet:
    """Comet."""

    def __init__(self, project: str, name: str, settings: dict):
        import comet_ml

        self.experiment = comet_ml.Experiment(project_name=project)
        self.experiment.set_name(name)
        self.experiment.log_parameters(settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.experiment.log_metrics(values, step=step)

    def picture(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        self.experiment.log_image(pixels, name=name, step=step)

    def close(self) -> None:
        self.experiment.end()


class Trackio:
    """Trackio, the local-first tracker of Hugging Face."""

    def __init__(self, project: str, name: str, settings: dict):
        import trackio

        self.trackio = trackio
        trackio.init(project=project, name=name, config=settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def picture(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        self.trackio.log({name: self.trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        self.trackio.finish()
