"""JOB 3: network + picture + prompt -> edited picture."""

from __future__ import annotations

from library import forecast
from library.config import resolved
from library.config.run import Run
from library.files import atomic_write
from library.inference.plan import Plan, make_plan
from library.models.base import Base
from library.models.cost import Work
from library.models.encoders import encoders_of

CONFIG_FILE = "config.edited.toml"
"""The configuration of the last call that wrote into a folder; each picture says for itself how it was made."""


def run(run: Run) -> None:
    """Edit what the configuration names. With `dry_run`, say what would be done and load no weights."""
    base = Base.open(run.model)
    base.transformer_file  # noqa: B018 - reads the header: a base that is no FLUX.1 Fill is refused before all else
    plan = make_plan(run, base.defaults)
    work = forecast.painting_of(
        run,
        [plan.seen(request) for request in plan.requests],
        run.inference.inference_batch_size,
        plan.steps,
        plan.token_length,
        [use.path for use in plan.networks],
        encoders_of(base),
    )
    run, chosen = forecast.settle_painting(run, base.shape, work)
    for line in [*chosen, *plan.lines()]:
        print(line)
    if run.command.dry_run:
        print("\n".join(_needs(run, base, plan, work)))
        return
    from library.inference.edit import edit

    edit(plan, run, base)
    if not plan.is_one_file:
        atomic_write(plan.folder / CONFIG_FILE, resolved.resolved_toml(run))
    count = len(plan.requests)
    print(f"wrote {plan.requests[0].output}" if count == 1 else f"wrote {count} pictures to {plan.folder}")


def _needs(run: Run, base: Base, plan: Plan, work: Work) -> list[str]:
    pictures = {request.picture.path: plan.seen(request) for request in plan.requests}
    return forecast.inference_lines(
        run,
        base.shape,
        work,
        len({request.picture.prompt for request in plan.requests}),
        list(pictures.values()),
        {request.output: request.fit.result for request in plan.requests},
    )
