"""What a training command will do, counted from the cache's own list before a weight is loaded. Needs no torch."""

from collections import Counter
from dataclasses import replace

from library import forecast
from library.config import resolved
from library.config.run import Run
from library.data.listing import Listing, listed
from library.data.order import Order
from library.models.base import Base
from library.networks import Plan
from library.networks.shapes import factorized, trained, trained_of
from library.networks.targets import Target
from library.training import budget, optimizer_arguments, saving, schedules
from library.training.outlook import outlook
from library.training.saving import Moment

_SHOWN_SAVES = 4


def lines(run: Run) -> list[str]:
    """The plan, line by line. Raises CacheError if the cache is not up to date."""
    base = Base.open(run.model)
    ahead = outlook(run, base)
    listing = listed(run)
    processes = budget.num_processes()
    per_epoch = batches_per_epoch(listing, processes)
    steps_per_epoch = epoch_steps(run, listing, processes)
    total = num_steps(run, listing, processes)
    return [
        *data_lines(run, listing),
        f"steps: {per_epoch} batches an epoch, {steps_per_epoch} steps an epoch, {total} steps in all"
        f" ({total / steps_per_epoch:.1f} epochs)" + (f" on {processes} processes" if processes > 1 else ""),
        *ahead.network_lines(),
        *optimizer_lines(run, total),
        *forecast.training_lines(budget.continued(run), base.shape, budget.work_of(run, base)),
        *save_lines(run, total, steps_per_epoch),
        *ahead.file_lines(),
        *preview_lines(run, listing),
        *changed_lines(run),
    ]


def num_steps(run: Run, listing: Listing, processes: int) -> int:
    """Steps of a run from its beginning."""
    return run.training.max_train_steps or epoch_steps(run, listing, processes) * run.training.max_train_epochs


def epoch_steps(run: Run, listing: Listing, processes: int) -> int:
    """Steps of an epoch; the last may have fewer batches."""
    return -(-batches_per_epoch(listing, processes) // run.training.gradient_accumulation_steps)


def optimizer_lines(run: Run, total: int) -> list[str]:
    """The optimizer and the course of its rate. Raises ConfigError for whatever of both cannot be."""
    table = run.optimizer
    left = optimizer_arguments.check(table.optimizer_type, table.optimizer_args)
    schedule = schedules.of_table(table, total)
    warmup = 0 if schedule.name == "constant" else schedule.warmup_steps
    after = f" after {warmup} steps of warm-up" if warmup else ""
    found = [f"optimizer: {table.optimizer_type}, learning rate {table.learning_rate:g}, {schedule.name}{after}"]
    return found + ([f"  {left}"] if left else [])


def batches_per_epoch(listing: Listing, processes: int) -> int:
    """Micro-steps of an epoch, counted by the code that makes them."""
    widened = [replace(member, batch_size=member.batch_size * processes) for member in listing.members]
    return Order(widened, 0).num_batches(0)


def data_lines(run: Run, listing: Listing) -> list[str]:
    """Items, pairs and buckets."""
    subsets = [subset for dataset in run.datasets for subset in dataset.subsets]
    modes = Counter(subsets[item.subset].mode for item in listing.items)
    kinds = ", ".join(f"{count} {mode}" for mode, count in modes.items())
    pairs = sum(subsets[item.subset].target_dir is not None for item in listing.items)
    found = [f"items: {len(listing.items)} ({kinds}), {pairs} of them pairs; {len(listing.held_out_items)} held out"]
    buckets: Counter[tuple] = Counter()
    for member in listing.members:
        for size in member.group[1]:
            buckets[(size, member.batch_size)] += round(member.repeats)
    for (size, batch_size), count in sorted(buckets.items()):
        full = -(-count // batch_size)
        found.append(f"  bucket {size[0]} x {size[1]}: {count} items, {full} batches of up to {batch_size}")
    return found


def save_lines(run: Run, num_steps: int, steps_per_epoch: int) -> list[str]:
    """Which files are written, and when."""
    name, table = run.saving.output_name, run.saving
    planned = []
    for step in range(1, num_steps + 1):
        moment = Moment(step, step // steps_per_epoch, step % steps_per_epoch == 0, step == num_steps)
        planned += [plan.stem for plan in saving.due(table, name, moment) if plan.stem]
    with_state = " with a state beside each" if table.save_state else " without states: a killed run starts again"
    found = [f"saved in {table.output_dir}: {name}.safetensors at the end"]
    if planned:
        shown = ", ".join(planned[:_SHOWN_SAVES]) + (f", ... ({len(planned)} in all)" if len(planned) > 4 else "")
        found.append(f"  on the way: {shown}{with_state}")
    else:
        found.append(
            "  nothing on the way: set save_every_n_steps or save_every_n_epochs, or a killed run starts again"
        )
    return found


def preview_lines(run: Run, listing: Listing) -> list[str]:
    """How many previews are painted, and when."""
    table = run.sampling
    items = min(table.sample_items, len(listing.items) + len(listing.held_out_items))
    count = len(listing.manifest.previews) + items
    if not count:
        return ["previews: none (no sample_prompts, no validation_prompt, no sample_items)"]
    every = (
        f"every {table.sample_every_n_epochs} epochs"
        if table.sample_every_n_epochs is not None
        else f"every {table.sample_every_n_steps} steps"
    )
    moments = [every, *["at the start"][: table.sample_at_first], *["at the end"][: table.sample_at_end]]
    whose = f" ({items} of the data's own items)" if items else ""
    return [f"previews: {count}{whose}, {', '.join(moments)}"]


def changed_lines(run: Run) -> list[str]:
    """Every key that differs from its default, and where that was said."""
    settings = resolved.changed(run)
    return ["settings that differ from their defaults:"] + [
        f"  {setting.place} = {setting.value}  ({setting.origin})" for setting in settings
    ]


def module_lines(run: Run) -> list[str]:
    """Every module that would be trained, with its rank, alpha and parameters; then the files."""
    ahead = outlook(run, Base.open(run.model))
    settled = ahead.plan
    found = [
        _module_line(target.module, target, _size_words(settled, target), trained_of(settled.settings, target))
        for target in settled.targets
    ]
    if settled.x_embedder is not None:
        out_features, in_features = settled.x_embedder
        count = out_features * (in_features + settled.x_embedder_bias)
        found.append(f"{'img_in (x_embedder)':<40} {in_features} -> {out_features}  in full, {count} parameters")
    for target in settled.text:
        words = f"rank {target.rank}, alpha {target.alpha:g}"
        count = target.rank * (target.in_features + target.out_features)
        found.append(_module_line(f"CLIP-L {target.module}", target, words, count))
    return [*found, f"{len(found)} modules; {trained(settled)} trained parameters", *ahead.file_lines()]


def _module_line(name: str, target: Target, words: str, count: int) -> str:
    return f"{name:<40} {target.in_features} -> {target.trained_rows}  {words}, {count} parameters"


def _size_words(settled: Plan, target: Target) -> str:
    kind = settled.settings.kind
    if kind == "full":
        return "in full"
    if kind == "diag-oft":
        return f"blocks of {factorized(target.out_features, target.rank)[0]}"
    return f"rank {target.rank}, alpha {target.alpha:g}"
