"""JOB 3: network + picture + prompt -> edited picture."""

from __future__ import annotations

from library import forecast
from library.conditioning import MODES
from library.config.run import Run
from library.inference.plan import make_plan
from library.models.base import Base


def run(run: Run) -> None:
    """Edit what the configuration names. With `dry_run`, say what would be done and load no weights."""
    base = Base.open(run.model)
    base.transformer_file  # noqa: B018 - reads the header: a base that is no FLUX.1 Fill is refused before all else
    plan = make_plan(run, base.defaults)
    run, chosen = forecast.settle(run, base.shape)
    for line in [*chosen, *plan.lines()]:
        print(line)
    if run.command.dry_run:
        width, height = MODES[plan.mode].canvas(*plan.largest_canvas)
        batch = run.inference.inference_batch_size
        print("\n".join(forecast.inference_lines(run, base.shape, width, height, batch)))
        return
    from library.inference.edit import edit

    edit(plan, run, base)
    count = len(plan.requests)
    print(f"wrote {plan.requests[0].output}" if count == 1 else f"wrote {count} pictures to {plan.folder}")
