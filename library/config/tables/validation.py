"""Held-out items: loss at fixed noise, generated images scored against their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from library.config.table import Floats, Table, key

if TYPE_CHECKING:
    from library.config.run import Run


class ValidationTable(Table):
    """Measurements on items the training never sees (validation_split, is_validation)."""

    section: ClassVar[str] = "validation"
    reads: ClassVar[str] = "train"

    validate_every_n_steps: int | None = key(None, ge=1, rerun=True)
    """Measure every N steps."""
    validate_every_n_epochs: int | None = key(None, ge=1, rerun=True)
    """Measure every N epochs; every epoch if there are held-out items and neither is set."""
    max_validation_steps: int | None = key(None, ge=1, rerun=True)
    """Use at most this many held-out items."""
    validation_timesteps: Floats = key((0.1, 0.3, 0.5, 0.7, 0.9), rerun=True)
    """Fixed points in (0, 1] at which the loss is measured."""
    validation_generate: int = key(0, ge=0, rerun=True)
    """Generate this many held-out items and score them against their targets (PSNR, SSIM, colour distance)."""
    save_best: bool = key(False, rerun=True)
    """Keep a copy of the network at its best measurement."""
    best_metric: Literal["loss", "loss_changed", "psnr", "ssim", "colour_distance"] = key(
        "loss", rerun=True, only_with="save_best or early_stop_patience"
    )
    """What best means."""
    early_stop_patience: int | None = key(None, ge=1, rerun=True)
    """Stop after this many measurements without an improvement."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Points outside the flow, and a measure of pictures where no pictures are made."""
        outside = [value for value in self.validation_timesteps if not 0 < value <= 1]
        if outside or not self.validation_timesteps:
            found = f"{outside[0]:g} is none" if outside else "there is none"
            yield ["validation_timesteps"], f"validation_timesteps: {found}; each is above 0 and at most 1 (all noise)."
        asks = "save_best" if self.save_best else "early_stop_patience" if self.early_stop_patience else ""
        if asks and self.best_metric in ("psnr", "ssim", "colour_distance") and not self.validation_generate:
            yield (
                ["best_metric", asks],
                f"best_metric = {self.best_metric} is measured on generated pictures, but validation_generate is 0: "
                f"{asks} would never see a gain. Set validation_generate to the number of held-out items to paint.",
            )

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Everything here is about held-out items."""
        subsets = [subset for dataset in run.datasets for subset in dataset.subsets]
        if any(dataset.validation_split for dataset in run.datasets) or any(one.is_validation for one in subsets):
            return
        for name, _, _info in self.entries():
            if self.changed(name) and name != "best_metric":
                yield (
                    [name],
                    f"{name} does nothing here: no item is held out. Set validation_split or is_validation.",
                )
