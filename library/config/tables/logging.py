"""Where the numbers of a run go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from library.config.table import FilePath, Table, as_tuple, key

if TYPE_CHECKING:
    from library.config.run import Run

Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "comet_ml", "trackio", "all", "none"], ...], BeforeValidator(as_tuple)
]

_NAMED = "report_to=wandb|comet_ml|trackio|all"


class LoggingTable(Table):
    """Trackers and reports. metrics.jsonl is always written."""

    section: ClassVar[str] = "logging"
    reads: ClassVar[str] = "train"

    logging_dir: FilePath = key("logs", path="output", kohya="none", rerun=True)
    """Folder of TensorBoard logs, inside output_dir unless absolute."""
    report_to: Trackers = key(("tensorboard",), aliases=("log_with",), comma=True, rerun=True)
    """Trackers: tensorboard, wandb, comet_ml, trackio, all (that are installed), none."""
    log_prefix: str | None = key(None, rerun=True, only_with="report_to=tensorboard|all")
    """Begins the name of the log folder of TensorBoard."""
    log_tracker_name: str | None = key(None, rerun=True, only_with=_NAMED)
    """Project name in wandb, comet and trackio; influx if not set."""
    wandb_run_name: str | None = key(None, rerun=True, only_with=_NAMED)
    """Run name in the trackers; output_name if not set."""
    wandb_api_key: str | None = key(None, secret=True, rerun=True, only_with="report_to=wandb|all")
    """Key of wandb; better given as the environment variable WANDB_API_KEY. Never stored or printed."""
    log_every_n_steps: int = key(1, ge=1, rerun=True)
    """Write the numbers every N steps."""
    report_html: bool = key(True, rerun=True)
    """Keep report.html in output_dir up to date: curves, previews, configuration, in one page."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """`none` stands alone."""
        if "none" in self.report_to and len(self.report_to) > 1:
            yield ["report_to"], f"report_to = {list(self.report_to)}: none cannot stand beside others."
