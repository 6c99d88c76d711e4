"""What is saved when, under which name, and what is removed again: kohya's rules and names."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.config.tables import SavingTable

STATE_SUFFIX = "-state"
ENDING = r"(?:-ema|_diffusers|_text_encoder|_(?:edit|mask|spatial)|_workflow|_api)*\.(?:safetensors|json)"
MANIFEST = "manifest.json"  # of a state folder: without it the folder does not count


@dataclass(frozen=True)
class Moment:
    """The end of an optimizer step. `epoch` counts finished epochs; `ends_epoch`: this step finished one.

    last: no step comes after it, because it is the last one or because the run stops early.
    """

    step: int
    epoch: int
    ends_epoch: bool
    last: bool


@dataclass(frozen=True)
class SavePlan:
    """What a moment saves: a network under `stem` if set, and a state beside it."""

    stem: str | None
    state: bool


def step_stem(name: str, step: int) -> str:
    """`name-step00000500`."""
    return f"{name}-step{step:08d}"


def epoch_stem(name: str, epoch: int) -> str:
    """`name-000003`."""
    return f"{name}-{epoch:06d}"


def due(table: SavingTable, name: str, moment: Moment) -> list[SavePlan]:
    """What is saved at `moment`. The last step's network has the plain name and is saved by the end of the run.

    Its state is what a longer run goes on from: without one, all of its steps would have to be done again.
    """
    if moment.last:
        return [SavePlan(None, True)] if table.save_state or table.save_state_on_train_end else []
    plans = []
    if table.save_every_n_steps and moment.step % table.save_every_n_steps == 0:
        plans.append(SavePlan(step_stem(name, moment.step), table.save_state))
    if moment.ends_epoch and table.save_every_n_epochs and moment.epoch % table.save_every_n_epochs == 0:
        plans.append(SavePlan(epoch_stem(name, moment.epoch), table.save_state))
    return plans


def momentssaved(table: SavingTable, num_steps: int, steps_per_epoch: int) -> Iterator[tuple[Moment, SavePlan]]:
    """Every save of a run, for the plan that is printed before it starts."""
    for step in range(1, num_steps + 1):
        moment = Moment(step, step // steps_per_epoch, step % steps_per_epoch == 0, step == num_steps)
        for plan in due(table, "", moment):
            yield moment, plan


def outdated(table: SavingTable, folder: Path, name: str, moment: Moment) -> list[Path]:
    """The networks and states that the `save_last_n_*` and `checkpoints_total_limit` keys no longer keep.

    The end of a run makes no room by steps or epochs, as in kohya: its own network and state are no part of the row.
    """
    old: list[Path] = []
    for is_state in (False, True) if not moment.last else ():
        last_steps, last_epochs = table.save_last_n_steps, table.save_last_n_epochs
        if is_state:
            last_steps = table.save_last_n_steps_state or last_steps
            last_epochs = table.save_last_n_epochs_state or last_epochs
        for path, kind, number in saved(folder, name, is_state):
            if kind == "step" and last_steps and number < moment.step - last_steps:
                old.append(path)
            elif kind == "epoch" and last_epochs and table.save_every_n_epochs:
                if number <= moment.epoch - table.save_every_n_epochs * last_epochs:
                    old.append(path)
    if table.checkpoints_total_limit:
        states = [path for path, _, _ in saved(folder, name, is_state=True) if path not in old]
        states += [path for path in [folder / f"{name}{STATE_SUFFIX}"] if path.is_dir()]
        states.sort(key=lambda path: path.stat().st_mtime_ns)
        old += states[: -table.checkpoints_total_limit]
    return old


def networks(folder: Path, name: str) -> list[Path]:
    """The networks that a run called `name` has saved, the newest last; their averages and other spellings left out."""
    pattern = re.compile(re.escape(name) + r"(?:-best|-step\d{8}|-\d{6})?\.safetensors")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def saved(folder: Path, name: str, is_state: bool) -> Iterator[tuple[Path, str, int]]:
    """The networks (with what lies beside them) or states of a run: path, "step" or "epoch", and which."""
    ending = re.escape(STATE_SUFFIX) if is_state else ENDING
    pattern = re.compile(re.escape(name) + r"-(?:step(\d{8})|(\d{6}))" + ending)
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and path.is_dir() == is_state:
            yield path, "step" if match[1] else "epoch", int(match[1] or match[2])


def remove(paths: list[Path]) -> None:
    """Delete networks and states. A state folder loses its manifest first, so that a kill leaves nothing half valid."""
    for path in paths:
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
