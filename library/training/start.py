"""Before any weight is loaded: is this a new run, one to continue, or one that is done, and under which seed?"""

import logging
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from library.config import resolved
from library.config.resolved import differences
from library.config.run import Run
from library.data.cached import CachedDataset
from library.errors import ConfigError
from library.files import atomic_write
from library.models.base import Base
from library.training import checkpoint, lineage, saving, state
from library.training.run_folder import Record, RunFolder, new_record
from library.training.sameness import identity_of, nothing_left
from library.training.state import RunState

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
    origin = lineage.origin(run.saving.resume, output.path, output.name, record)
    found = origin.folder
    scalars = None if found is None else state.read_scalars(found)
    if scalars is not None:
        checkpoint.refuse_other_run(found, scalars, identity)
    done = nothing_left(run, output.path, record) if origin.back is None else ""
    if done:
        return Start(output.path, 0, identity, None, done)
    if found is None and record is not None:
        _begin_again(output, record)
    elif found is None and run.saving.resume == "latest":
        log.info("resume = latest, but %s holds no state yet: a run begins", output.path)
    seed = run.training.seed
    assert seed is not None, "settled before the cache was opened"
    _warn_of_other_bits(
        (scalars or {}).get("identity") or (record.identity if record is not None else identity), identity
    )
    record = record or new_record(identity, seed)
    if origin.back is not None:
        lineage.set_aside(output.path, output.name, scalars["step"], scalars["epoch"])
        record = replace(record, finished_steps=None, finished_epochs=None, stopped_early=None, resumed=origin.back)
    output.write_record(replace(record, identity=identity))
    atomic_write(output.path / CONFIG_FILE, resolved.resolved_toml(run))
    if scalars is not None:
        log.info("continuing %s: step %d, epoch %d", found, scalars["step"], scalars["epoch"])
    return Start(output.path, seed, identity, found)


def _warn_of_other_bits(old: dict[str, object], new: dict[str, object]) -> None:
    changed = differences(resolved.split(old)[1], resolved.split(new)[1])
    if changed:
        log.warning(
            "warning: the run goes on in another precision than before: %s. What it learns from here on is not what it "
            "would have been to the bit", "; ".join(changed),
        )  # fmt: skip


def settle_seed(run: Run, output: RunFolder) -> int:
    """The configured seed, else the one drawn when the run began, else a new one. Every draw of the run uses it."""
    if run.training.seed is not None:
        return run.training.seed
    record = output.record()
    if record is not None:
        return record.seed
    found = lineage.origin(run.saving.resume, output.path, output.name, None).folder
    return secrets.randbelow(2**31) if found is None else state.read_scalars(found)["seed"]


def _begin_again(output: RunFolder, record: Record) -> None:
    """A run without a state starts from its first step again, unless that would overwrite what it has made."""
    networks = saving.networks(output.path, output.name)
    if networks:
        how = "was finished" if record.finished_steps is not None else "was not finished"
        raise ConfigError(
            f"{output.path} holds this run, which {how}, but no state to go on from: starting again would overwrite "
            f"{networks[0].name}. Use --fresh to start in a numbered folder, and network_weights = "
            f"{networks[-1]} to begin there with what was learnt (the optimizer starts anew)"
        )
    log.info("%s holds this run without a state to go on from: it starts again from the beginning", output.path)
