"""JOB 2: cache -> LoRA. Never loads a text encoder or a VAE encoder. Importing this imports no torch.

Reading order: job (the order of events), start (new, continued or done), assemble (the parts), loop (the heart),
objective (t, noise, loss), epochs and data (which items when), optimizers, rates, schedules, rounding, ema, loss_scale
(the step), keeper, saving, checkpoint, state (what is written), conduct, logbook, metrics, trackers, report (what is
shown), validation, scores, processes, signals, run_folder (many machines, and being stopped).
"""

from library.config.run import Run


def run(run: Run) -> int:
    """Train, or show what training would do. Returns the exit code."""
    from library.training.job import train

    return train(run)
