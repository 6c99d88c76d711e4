"""What a run says while it trains: the progress bar, metrics.jsonl and the trackers. Only the main process speaks."""

import contextlib
from pathlib import Path

import torch
from tqdm import tqdm

from library.training.loop import StepResult, Trained
from library.training.metrics import Metrics
from library.training.trackers import Tracker

_TAGS = {
    "loss": "loss/current",
    "loss_average": "loss/average",
    "gradient_norm": "norm/grad_norm",
    "seconds": "time/step_s",
    "vram_gb": "vram/peak_gb",
    "skipped": "norm/skipped_steps",
    "overflows": "norm/overflows",
    "loss_scale": "norm/loss_scale",
}


class Logbook:
    """Writes every step's numbers."""

    def __init__(self, folder: Path, trackers: list[Tracker], every: int, step: int, num_steps: int):
        self.metrics = Metrics(folder, step)
        self.trackers = trackers
        self.every = every
        # in a pipe or a log file a bar would write a line every tenth of a second
        self.bar = tqdm(total=num_steps, initial=step, desc="steps", unit="step", dynamic_ncols=True, mininterval=0.5)

    def step(self, trained: Trained, result: StepResult) -> None:
        """One optimizer step."""
        progress = trained.progress
        values: dict[str, float] = {"epoch": progress.epoch}
        if result.stepped:
            values |= {"loss": result.loss, "loss_average": self.metrics.loss(result.loss)}
            values["gradient_norm"] = result.norm
        values["seconds"] = round(result.seconds, 4)
        values["skipped"] = progress.skipped
        if trained.scale.acts:
            values |= {"overflows": progress.overflows, "loss_scale": trained.scale.value}
        values |= {f"lr/{name}": rate for name, rate in trained.optimizer.rates().items()}
        values |= {f"lr/d*lr/{name}": rate for name, rate in trained.optimizer.effective_rates().items()}
        if torch.cuda.is_available():
            values["vram_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        shown = trained.optimizer.effective_rates() or trained.optimizer.rates()
        rate = next(iter(shown.values()), 0.0)
        self._show(f"loss {values.get('loss_average', float('nan')):.4f}, lr {rate:.2e}")
        if progress.step % self.every == 0:
            self.numbers(progress.step, values)

    def _show(self, text: str) -> None:
        """Move the bar. A terminal that is gone (`| head`, a closed window) does not end a run."""
        try:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        except OSError:
            self.bar.disable = True

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Any numbers of a step, to the file and the trackers."""
        self.metrics.write(step, values)
        for tracker in self.trackers:
            tracker.numbers(step, {_TAGS.get(name, name): value for name, value in values.items()})

    def pictures(self, step: int, files: dict[str, Path]) -> None:
        """Preview pictures by name, to the trackers. The step is no part of a name there."""
        if not self.trackers:
            return
        import numpy
        from PIL import Image

        for name, path in files.items():
            with Image.open(path) as image:
                pixels = numpy.asarray(image.convert("RGB"))
            for tracker in self.trackers:
                tracker.picture(step, name.removesuffix(f"_{step:08d}"), pixels)

    def close(self) -> None:
        """Finish every display."""
        with contextlib.suppress(OSError):
            self.bar.close()
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()
