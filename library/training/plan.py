"""What a training command will do, counted from the cache's own list before a weight is loaded. Needs no torch."""

import contextlib
from collections import Counter
from dataclasses import replace

from library import forecast
from library.config import resolved
from library.config.run import Run
from library.config.tables import SavingTable
from library.data.listing import Listing, listed
from library.data.order import Order
from library.data.shares import share_table
from library.errors import ConfigError
from library.models.base import Base
from library.networks import Plan
from library.networks.shapes import factorized, trained, trained_of
from library.networks.targets import Target
from library.training import budget, hub, optimizer_arguments, saving, schedules, trackers
from library.training.outlook import outlook
from library.training.saving import Moment
from library.training.standing import standing_lines

_SHOWN_SAVES = 4


def lines(run: Run) -> list[str]:
    """The plan, line by line. Raises CacheError if the cache is not up to date."""
    base = Base.open(run.model)
    ahead = outlook(run, base)
    trackers.wanted(run.logging.report_to)
    if run.saving.push_to_hub:
        hub.token_of(run.saving)
    listing = listed(run)
    processes = budget.num_processes()
    per_epoch = batches_per_epoch(listing, processes)
    steps_per_epoch = epoch_steps(run, listing, processes)
    total = num_steps(run, listing, processes)
    return [
        *standing_lines(_settled(run), listing, base),
        *data_lines(run, listing),
        f"steps: {per_epoch} batches an epoch, {steps_per_epoch} steps an epoch, {total} steps in all"
        f" ({total / steps_per_epoch:.1f} epochs)" + (f" on {processes} processes" if processes > 1 else ""),
        *ahead.network_lines(),
        *optimizer_lines(run, total),
        *forecast.training_lines(budget.continued(run), base.shape, budget.work_of(run, base)),
        *save_lines(run, total, steps_per_epoch),
        *ahead.file_lines(),
        *preview_lines(run, listing),
        *validation_lines(run, listing),
        *tracker_lines(run),
        *changed_lines(run),
    ]


def _settled(run: Run) -> Run:
    """As training would settle the memory; what does not fit is said by the forecast, which goes on."""
    with contextlib.suppress(ConfigError):
        return budget.settled(run)[0]
    return run


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
    """Items, pairs, shares and buckets."""
    subsets = [subset for dataset in run.datasets for subset in dataset.subsets]
    modes = Counter(subsets[item.subset].mode for item in listing.items)
    kinds = ", ".join(f"{count} {mode}" for mode, count in modes.items())
    found = [
        f"items: {len(listing.items)} ({kinds}), {listing.num_pairs} of them pairs; "
        f"{len(listing.held_out_items)} held out"
    ]
    if len(subsets) > 1:
        found += share_table(listing.shares).splitlines()
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
    with_state = (
        " with a state beside each" if table.save_state else " without states: a run that is killed cannot be continued"
    )
    at_end = [f"{name}.safetensors", *[f"{name}-ema.safetensors"][: run.training.use_ema]]
    last = saving.due(table, name, Moment(num_steps, 0, False, True))
    at_end += ["a state"] if any(plan.state for plan in last) else []
    found = [f"saved in {table.output_dir}: {', '.join(at_end)} at the end"]
    if planned:
        shown = ", ".join(planned[:_SHOWN_SAVES]) + (f", ... ({len(planned)} in all)" if len(planned) > 4 else "")
        found.append(f"  on the way: {shown}{with_state}")
        found += [f"  kept of them: {limit}" for limit in [_limits(table)] if limit]
    else:
        found.append(
            "  nothing on the way: set save_every_n_steps or save_every_n_epochs, or a killed run starts again"
        )
    return found


def _limits(table: SavingTable) -> str:
    """What is removed again."""
    limits = {
        "networks of the last {} steps": table.save_last_n_steps,
        "networks of the last {} epochs": table.save_last_n_epochs,
        "states of the last {} steps": table.save_last_n_steps_state or table.save_last_n_steps,
        "states of the last {} epochs": table.save_last_n_epochs_state or table.save_last_n_epochs,
        "at most {} states": table.checkpoints_total_limit,
    }
    return ", ".join(words.format(count) for words, count in limits.items() if count)


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


def validation_lines(run: Run, listing: Listing) -> list[str]:
    """What is measured on held-out items, when, and what follows from it."""
    table, count = run.validation, len(listing.held_out_items)
    if not count:
        return ["validation: none (no item is held out)"]
    steps, epochs = table.validate_every_n_steps, table.validate_every_n_epochs
    moments = [f"every {steps} steps"] if steps else []
    moments += [f"every {epochs or 1} epochs"] if epochs or not steps else []
    measured = min(count, table.max_validation_steps or count)
    words = [f"validation: {measured} held-out items, {' and '.join(moments)} and at the end"]
    if table.validation_generate:
        words.append(f"{min(count, table.validation_generate)} of them painted and scored")
    if table.save_best:
        words.append(f"the best {table.best_metric} saved as {run.saving.output_name}-best.safetensors")
    if table.early_stop_patience:
        words.append(f"stops after {table.early_stop_patience} measurements without a better {table.best_metric}")
    return ["; ".join(words)]


def tracker_lines(run: Run) -> list[str]:
    """Where numbers go, and the upload."""
    shown = ["metrics.jsonl", *["report.html"][: run.logging.report_html], *trackers.wanted(run.logging.report_to)]
    found = [f"shown in: {', '.join(shown)}"]
    if run.saving.push_to_hub:
        where = run.saving.hub_model_id or run.saving.output_dir.name
        found.append(f"uploaded at the end: {where} (the token is tried out when the run starts)")
    return found


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
