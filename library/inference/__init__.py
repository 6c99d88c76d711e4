"""JOB 3: network + picture + prompt -> edited picture."""

from __future__ import annotations

from library.config.run import Run
from library.forecast import inference_lines
from library.inference.plan import make_plan
from library.models.base import Base


def run(run: Run) -> None:
    """Edit what the configuration names. With `dry_run`, say what would be done and load no weights."""
    base = Base.open(run.model)
    base.transformer_file  # noqa: B018 - reads the header: a base that is no FLUX.1 Fill is refused before anything else
    plan = make_plan(run, base.defaults)
    for line in plan.lines():
        print(line)
    if run.command.dry_run:
        width, height = max((request.fit.canvas for request in plan.requests), key=lambda size: size[0] * size[1])
        print("\n".join(inference_lines(run, base.shape, width, height, batch=1)))
        return
    from library.inference.edit import edit

    edit(plan, run, base)
    count = len(plan.requests)
    print(f"wrote {plan.requests[0].output}" if count == 1 else f"wrote {count} pictures to {plan.folder}")
