"""Writing down what a run has learnt: networks for the user, states for the run itself."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from library.config.tables import SavingTable
from library.errors import UserError
from library.networks.file import save_network
from library.networks.metadata import Description
from library.networks.workflow import write_workflows
from library.training import checkpoint, saving, state
from library.training.loop import Trained
from library.training.optimizers import OptimizerSet
from library.training.rounding import float32_look
from library.training.saving import Moment

log = logging.getLogger(__name__)


@contextlib.contextmanager
def on_view(trained: Trained, average: bool = True) -> Iterator[None]:
    """Inside the block the network is as it should be looked at: no dropout, averaged weights where there are any.

    Afterwards every weight is what it was, to the bit.
    """
    optimizer = trained.optimizer
    with contextlib.ExitStack() as stack:
        stack.enter_context(trained.network.at_rest())
        if optimizer.schedule_free:
            held = [(parameter, parameter.detach().clone()) for parameter in optimizer.parameters()]
            _switch(optimizer, False)
            stack.callback(_put_back, held)
            stack.callback(_switch, optimizer, True)
        if average and trained.ema is not None:
            stack.enter_context(trained.ema.applied())
        yield


def _switch(optimizer: OptimizerSet, training: bool) -> None:
    with float32_look(list(optimizer.parameters())):
        optimizer.training(training)


@torch.no_grad()
def _put_back(held: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, value in held:
        parameter.copy_(value)


@dataclass
class Keeper:
    """Saves networks and states. Only the main process has one.

    describe: makes the metadata of a network saved now. segments: how the present epoch was cut so far.
    """

    table: SavingTable
    folder: Path
    trained: Trained
    dtype: torch.dtype
    seed: int
    identity: dict[str, object]
    describe: Callable[[], Description]
    segments: Callable[[], list]

    def network(self, stem: str) -> list[Path]:
        """Save the network, and its average beside it if there is one; returns the files.

        Whatever goes wrong, the step is kept: its state is saved before the error goes on.
        """
        try:
            with on_view(self.trained, average=False):
                written = self._file(stem)
            if self.trained.ema is not None:
                with on_view(self.trained):
                    written += self._file(f"{stem}-ema")
        except Exception:
            self._rescue()
            raise
        return written

    def _rescue(self) -> None:
        """Save the state of a step whose network could not be saved; an error here must not hide that one."""
        stem = saving.step_stem(self.table.output_name, self.trained.progress.step)
        if not self._is_sound() or (self.folder / f"{stem}{saving.STATE_SUFFIX}").exists():
            return
        try:
            kept = self.state(stem)
        except (OSError, UserError, RuntimeError) as error:
            log.error("the state cannot be saved either: %s", error)
            return
        log.error("the network cannot be saved; the state is (%s): mend what is said below, run again", kept)

    def _is_sound(self) -> bool:
        """Whether every weight is finite: a state that is not must not be taken for the newest good one."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trained.network.trained())

    def _file(self, stem: str) -> list[Path]:
        path, description = self.folder / f"{stem}.safetensors", self.describe()
        written = save_network(
            path,
            self.trained.network.export(),
            description,
            format=self.table.save_format,
            dtype=self.dtype,
            minimal_metadata=self.table.no_metadata,
        )
        if self.table.save_workflow:
            workflows, refused = write_workflows(path, description)
            written += workflows
            for line in refused:
                log.info(line)
        return written

    def state(self, stem: str) -> Path:
        """Save the state."""
        folder = self.folder / f"{stem}{saving.STATE_SUFFIX}"
        saved = checkpoint.collect(self.trained, self.table.output_name, self.seed, self.identity, self.segments())
        state.save(folder, saved)
        return folder

    def after_step(self, moment: Moment) -> None:
        """Save what is due, then remove what is no longer kept: there is never less than before.

        The state comes first: it holds the network too, and no format can refuse it.
        """
        plans = saving.due(self.table, self.table.output_name, moment)
        for plan in plans:
            if plan.state and self._is_sound():
                self.state(plan.stem or self.table.output_name)
            if plan.stem is not None:
                self.network(plan.stem)
        if plans:
            saving.remove(saving.outdated(self.table, self.folder, self.table.output_name, moment))

    def interrupted(self) -> Path:
        """Save network and state of a run that has to stop now; returns the state's folder."""
        stem = saving.step_stem(self.table.output_name, self.trained.progress.step)
        kept = self.state(stem)
        self.network(stem)
        return kept
