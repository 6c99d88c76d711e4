"""What happens between two steps: numbers, files, previews, measurements, the report. Only the main process does it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.config import resolved
from library.config.run import Run
from library.training import report
from library.training.keeper import Keeper, on_view
from library.training.logbook import Logbook
from library.training.loop import StepResult, Trained
from library.training.metrics import read
from library.training.pictures import Painter
from library.training.report import Page
from library.training.saving import Moment
from library.training.signals import StopAsked
from library.training.validation import gain, is_measured

log = logging.getLogger(__name__)
REPORT_SECONDS = 30.0  # between two rewrites of the report
BEST = "-best"

Measure = Callable[[], dict[str, float]]
"""The loss on held-out items."""


@dataclass
class Conduct:
    """The course of a run around its steps."""

    run: Run
    folder: Path
    trained: Trained
    keeper: Keeper
    logbook: Logbook
    num_steps: int
    dataset_facts: tuple[tuple[str, str], ...]
    painter: Painter
    measure: Measure | None = None
    _reported: float = 0.0

    def is_out_of_patience(self) -> bool:
        """Whether early_stop_patience is used up: also in a state that was saved just before the run stopped early."""
        patience = self.run.validation.early_stop_patience
        return patience is not None and self.trained.progress.measured_without_gain >= patience

    def begin(self) -> None:
        """Before the first step."""
        if self.run.sampling.sample_at_first and self.trained.progress.step == 0:
            self._preview()
        self._report("running", force=True)

    def after_step(self, result: StepResult) -> bool:
        """Everything that is due after a step; returns whether the run stops early."""
        progress = self.trained.progress
        last = progress.step >= self.num_steps
        self.logbook.step(self.trained, result)
        self._measure_if_due(result, last)
        stop = not last and self.is_out_of_patience()
        if stop:
            table = self.run.validation
            log.info("no better %s in %d measurements: stopping early", table.best_metric, table.early_stop_patience)
        last = last or stop
        # Files before pictures: whatever goes wrong while painting, the step is kept.
        self.keeper.after_step(Moment(progress.step, progress.epoch, result.ends_epoch, last))
        if not last and due(
            progress.step, result, progress.epoch, self.run.sampling.sample_every_n_steps,
            self.run.sampling.sample_every_n_epochs,
        ):  # fmt: skip
            self._preview()
        self._report("running")
        return stop

    def finish(self) -> None:
        """After the last step: the network under its plain name, previews, the report."""
        self.keeper.network(self.run.saving.output_name)
        if self.run.sampling.sample_at_end:
            self._preview()
        self._report("finished", force=True)

    def close(self, status: str) -> None:
        """Leave every display in order, whatever happened."""
        self._report(status, force=True)
        self.logbook.close()

    def _preview(self) -> None:
        step = self.trained.progress.step
        try:
            with on_view(self.trained):
                made = self.painter.preview(step)
        except StopAsked:
            log.info("the previews of step %d are left out", step)
            return
        self.logbook.pictures(step, made)

    def _measure_if_due(self, result: StepResult, last: bool) -> None:
        table, progress = self.run.validation, self.trained.progress
        every_epochs = table.validate_every_n_epochs
        if table.validate_every_n_steps is None and every_epochs is None:
            every_epochs = 1
        if self.measure is None:
            return
        if not last and not due(progress.step, result, progress.epoch, table.validate_every_n_steps, every_epochs):
            return
        try:
            with on_view(self.trained):
                values = self.measure() | self.painter.score(progress.step)
        except StopAsked:
            log.info("the measurement of step %d is left out", progress.step)
            return
        self.logbook.numbers(progress.step, values)
        log.info("step %d: %s", progress.step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        better = gain(table.best_metric, values, progress.best)
        if better is not None:
            progress.best, progress.measured_without_gain = better, 0
            if table.save_best:
                self.keeper.network(self.run.saving.output_name + BEST)
            return
        if is_measured(table.best_metric, values):
            progress.measured_without_gain += 1

    def _report(self, status: str, force: bool = False) -> None:
        if not self.run.logging.report_html or (not force and time.monotonic() - self._reported < REPORT_SECONDS):
            return
        self._reported = time.monotonic()
        gallery = self.painter.gallery()
        settings = tuple((s.place, str(s.value), s.origin) for s in resolved.settings(self.run))
        report.write(
            self.folder,
            Page(
                name=self.run.saving.output_name,
                status=status,
                step=self.trained.progress.step,
                total=self.num_steps,
                metrics=read(self.logbook.metrics.path),
                columns=gallery.columns,
                rows=gallery.rows,
                dataset=self.dataset_facts,
                configuration=settings,
            ),
        )


def due(step: int, result: StepResult, epoch: int, every_steps: int | None, every_epochs: int | None) -> bool:
    """Whether something that happens every so many epochs (which wins) or steps happens now."""
    if every_epochs is not None:
        return result.ends_epoch and epoch % every_epochs == 0
    return every_steps is not None and step % every_steps == 0
