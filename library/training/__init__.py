"""JOB 2: cache -> LoRA. Never loads a text encoder or a VAE encoder. Importing this imports no torch.

Reading order: plan, budget (said and chosen before anything is loaded), job (the order of events), probing (does it
fit), start and lineage (new, continued or done, and from where), assemble (the parts), loop (the heart),
objective (t, noise, loss), epochs and data (which items when), optimizers, rates, schedules, rounding, ema, loss_scale
(the step), keeper, saving, checkpoint, state (what is written), conduct, logbook, metrics, trackers, report (what is
shown), validation, scores, processes, signals, run_folder (many machines, and being stopped).
"""

from library.config.run import Run


def run(run: Run) -> int:
    """Train, or show what training would need. Returns the exit code."""
    if run.command.dry_run:
        from library.training import plan

        print("\n".join(plan.lines(run)))
        return 0
    if run.command.list_modules:
        from library.training import plan

        print("\n".join(plan.module_lines(run)))
        return 0
    if run.command.show_timesteps:
        from library.training.show_timesteps import show

        return show(run)
    from library.training.budget import settled

    run, chosen = settled(run)
    for line in chosen:
        print(line)
    from library.training.job import train

    return train(run)
