"""Where a run happens, checked and opened before any weight is loaded: processes, folder, cache, base."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from library.config.run import Run
from library.data.cached import CachedDataset, open_cache
from library.memory.capability import DTYPES, capability_of, mixed_precision
from library.models import feasible
from library.models.base import Base
from library.training import processes, start
from library.training.processes import World
from library.training.run_folder import LOCK, RunFolder, fresh_folder
from library.training.sameness import with_seed
from library.training.signals import StopRequests
from library.training.start import CONFIG_FILE, Start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """`output` is the locked folder, on the main process alone. `mixed`: the precision of the arithmetic."""

    run: Run
    world: World
    device: torch.device
    dataset: CachedDataset
    base: Base
    start: Start
    output: RunFolder | None
    stop: StopRequests
    mixed: str

    @property
    def again(self) -> str:
        """How to go on with this run: --fresh would begin another one."""
        if not self.run.command.fresh:
            return "the same command again"
        return f"influx_train.py --config_file {self.start.folder / CONFIG_FILE}"

    @property
    def sharded(self) -> bool:
        """Whether the base is split over the processes."""
        return self.world.size > 1 and processes.sharding_wanted()


@contextlib.contextmanager
def opened(run: Run, world: World, device: torch.device) -> Iterator[Site]:
    """Lock the folder, check the cache, and decide what to do."""
    folder = processes.by_main(lambda: _folder(run), world)
    assert isinstance(folder, Path)
    run = _moved(run, folder)
    with contextlib.ExitStack() as stack:
        if world.is_main and not folder.exists():
            stack.callback(_remove_unused, folder)
        output = RunFolder(folder, run.saving.output_name) if world.is_main else None
        seed = processes.by_main(lambda: _entered(stack, output, run), world)
        assert isinstance(seed, int)
        dataset = open_cache(run, seed)
        stack.callback(dataset.close)
        base = Base.open(run.model)
        mixed = _precision(run, base, device)
        run = with_seed(run, seed)
        begun = processes.by_main(lambda: start.decide(run, output, dataset, base), world)
        assert isinstance(begun, Start)
        stop = stack.enter_context(StopRequests(folder))
        if output is not None:
            stop.forget_file()
        yield Site(run, world, device, dataset, base, begun, output, stop, mixed)


def _precision(run: Run, base: Base, device: torch.device) -> str:
    """The precision of the arithmetic. Raises ConfigError if the device cannot do what the run asks of it."""
    able = capability_of(device)
    mixed = mixed_precision(run.training.mixed_precision, able)
    if mixed != run.training.mixed_precision and able.kind == "cuda" and not able.bf16:
        log.warning('%s has no bf16: the arithmetic is fp32. Set mixed_precision = "no", so that plans count it', able)
    feasible.require(run.memory, base.shape, DTYPES[mixed], able)
    feasible.require_training(run.memory, DTYPES[mixed], able)
    return mixed


def _remove_unused(folder: Path) -> None:
    """A run that was refused leaves no folder behind where there was none."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:
        (folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has begun to work in it
            folder.rmdir()


def _entered(stack: contextlib.ExitStack, output: RunFolder, run: Run) -> int:
    """Lock the folder; the run's seed."""
    return start.settle_seed(run, stack.enter_context(output))


def _moved(run: Run, folder: Path) -> Run:
    """The run in the folder that --fresh found: its logs go there, and what is written down says so."""
    before, logs = run.saving.output_dir, run.logging.logging_dir
    if folder == before:
        return run
    if logs.is_relative_to(before):
        run = run.with_values("logging", "--fresh", logging_dir=folder / logs.relative_to(before))
    return run.with_values("saving", "--fresh", output_dir=folder)


def _folder(run: Run) -> Path:
    return fresh_folder(run.saving.output_dir, run.saving.output_name) if run.command.fresh else run.saving.output_dir
