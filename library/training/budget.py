"""The memory settings for a training run's budget. A continued run keeps the precision it began with, if that fits.

What is free in RAM differs from day to day, and with it the choice; the base's precision is part of what a run is.
"""

import os

from library import forecast
from library.config.run import Run
from library.errors import ConfigError
from library.models.base import Base
from library.models.cost import Work
from library.models.encoders import encoders_of
from library.training.run_folder import RunFolder

PRECISION = "base_precision"


def num_processes() -> int:
    """As the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def work_of(run: Run, base: Base) -> Work:
    """The heaviest moments of one process."""
    if run.cache.t5xxl_max_token_length is None:
        length = base.defaults.t5xxl_max_token_length
        run = run.with_values("cache", "the base", t5xxl_max_token_length=length)
    return forecast.work_of(run, base.shape, num_processes(), encoders_of(base))


def continued(run: Run) -> Run:
    """The run with the precision that the one in its folder was begun with, where the budget would choose it."""
    memory = run.memory
    if memory.vram_budget_gb is None or "base_precision" in memory.model_fields_set or run.command.fresh:
        return run
    record = RunFolder(run.saving.output_dir, run.saving.output_name).record()
    begun = None if record is None else record.identity.get(PRECISION)
    return run if begun is None else run.with_values("memory", "the run in output_dir", base_precision=begun)


def settled(run: Run) -> tuple[Run, list[str]]:
    """The run with its memory settings, and the lines that say so."""
    if run.memory.vram_budget_gb is None:
        return run, []
    kept, base = continued(run), Base.open(run.model)
    try:
        return forecast.settle(kept, base.shape, work=work_of(kept, base))
    except ConfigError:
        if kept is run:
            raise
        # a budget that was lowered since, as the advice after running out of memory says: the precision follows
        return forecast.settle(run, base.shape, work=work_of(run, base))
