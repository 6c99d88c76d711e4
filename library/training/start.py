"""Before any weight is loaded: is this a new run, one to continue, or one that is done, and under which seed?"""

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from library.config import resolved
from library.config.resolved import differences
from library.config.run import Run
from library.data.cached import CachedDataset
from library.files import atomic_write
from library.models.base import Base
from library.training import checkpoint, state
from library.training.run_folder import Record, RunFolder, new_record
from library.training.sameness import identity_of
from library.training.state import RunState, StateError

log = logging.getLogger(__name__)
CONFIG_FILE = "config.resolved.toml"


@dataclass(frozen=True)
class Start:
    """Where and from what a run starts. `done`: why there is nothing to do, if so."""

    folder: Path
    seed: int
    identity: dict[str, object]
    state_folder: Path | None = None
    done: str = ""

    def saved(self) -> RunState | None:
        """The state to continue from, if there is one."""
        return None if self.state_folder is None else state.load(self.state_folder)


def decide(run: Run, output: RunFolder, dataset: CachedDataset, base: Base) -> Start:
    """Look at what the folder holds. Raises ConfigError if it holds something else."""
    record = output.record()
    identity = identity_of(run, dataset, base)
    if record is not None and not record.begun and differences(record.identity, identity):
        log.info("%s held a run that had finished no step: this one takes its place", output.path)
        record = None
    output.refuse_strangers(record, identity)
    found = _state_folder(run, output.path, record)
    scalars = None if found is None else state.read_scalars(found)
    if scalars is not None:
        checkpoint.refuse_other_run(found, scalars, identity)
    done = _done(run, output.path, record)
    if done:
        return Start(output.path, 0, identity, None, done)
    seed = _seed(run, record, scalars)
    if record is None:
        output.write_record(new_record(identity, seed))
    atomic_write(output.path / CONFIG_FILE, resolved.resolved_toml(run))
    if scalars is not None:
        log.info("continuing %s: step %d, epoch %d", found, scalars["step"], scalars["epoch"])
    return Start(output.path, seed, identity, found)


def _seed(run: Run, record: Record | None, scalars: dict | None) -> int:
    """The configured seed, else the one drawn when the run began, else a new one."""
    if scalars is not None:
        return scalars["seed"]
    if run.training.seed is not None:
        return run.training.seed
    return record.seed if record is not None else secrets.randbelow(2**31)


def _done(run: Run, folder: Path, record: Record | None) -> str:
    if record is None or record.finished_steps is None:
        return ""
    wanted = run.training.max_train_steps
    longer = run.training.max_train_epochs > (record.finished_epochs or 0) if wanted is None else False
    if longer or (wanted or 0) > record.finished_steps:
        return ""
    return (
        f"{folder} holds this run, finished after {record.finished_steps} steps: nothing is left to do. Raise "
        "max_train_steps or max_train_epochs to go on, or use --fresh to start a new run in a numbered folder"
    )


def _state_folder(run: Run, folder: Path, record: Record | None) -> Path | None:
    """The state to continue from: the one `resume` names, else the newest whole one of this run."""
    wanted = run.saving.resume
    if wanted is not None and wanted != "latest":
        return Path(wanted) if Path(wanted).exists() else folder / wanted
    found, troubles = state.newest(folder, run.saving.output_name)
    for trouble in troubles:
        log.warning("state left out: %s", trouble)
    if found is None and wanted == "latest":
        raise StateError(f"resume = latest, but {folder} holds no state of {run.saving.output_name!r}")
    if found is None and record is not None and not _done(run, folder, record):
        log.info("%s holds this run without a state to go on from: it starts again from the beginning", folder)
    return found
