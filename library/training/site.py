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
from library.training.start import Start

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
    def sharded(self) -> bool:
        """Whether the base is split over the processes."""
        return self.world.size > 1 and processes.sharding_wanted()


@contextlib.contextmanager
def opened(run: Run, world: World, device: torch.device) -> Iterator[Site]:
    """Lock the folder, check the cache, and decide what to do."""
    folder = processes.from_main(_folder(run), world)
    assert isinstance(folder, Path)
    with contextlib.ExitStack() as stack:
        if world.is_main and not folder.exists():
            stack.callback(_remove_unused, folder)
        output = stack.enter_context(RunFolder(folder, run.saving.output_name)) if world.is_main else None
        seed = processes.from_main(start.settle_seed(run, output) if output is not None else None, world)
        assert isinstance(seed, int)
        dataset = open_cache(run, seed)
        stack.callback(dataset.close)
        base = Base.open(run.model)
        mixed = _precision(run, base, device)
        run = with_seed(run, seed)
        begun = start.decide(run, output, dataset, base) if output is not None else None
        begun = processes.from_main(begun, world)
        assert isinstance(begun, Start)
        stop = stack.enter_context(StopRequests(folder))
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


def _folder(run: Run) -> Path:
    return fresh_folder(run.saving.output_dir, run.saving.output_name) if run.command.fresh else run.saving.output_dir
