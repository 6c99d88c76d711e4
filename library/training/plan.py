"""What a training command will do, counted from the cache's own list before a weight is loaded. Needs no torch."""

import os
from collections import Counter
from dataclasses import replace

from library import forecast
from library.config import resolved
from library.config.run import Run
from library.data.listing import Listing, listed
from library.data.order import Order
from library.data.shares import share_table
from library.models.base import Base
from library.models.keymap import linear_shapes
from library.networks import plan as plan_network
from library.training import saving
from library.training.saving import Moment

_SHOWN_SAVES = 4


def lines(run: Run) -> list[str]:
    """The plan, line by line. Raises CacheError if the cache is not up to date."""
    listing = listed(run)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = batches_per_epoch(listing, processes)
    steps_per_epoch = -(-per_epoch // run.training.gradient_accumulation_steps)
    num_steps = run.training.max_train_steps or steps_per_epoch * run.training.max_train_epochs
    return [
        *data_lines(run, listing),
        f"steps: {per_epoch} batches an epoch, {steps_per_epoch} steps an epoch, {num_steps} steps in all"
        f" ({num_steps / steps_per_epoch:.1f} epochs)" + (f" on {processes} processes" if processes > 1 else ""),
        *forecast.training_lines(run, Base.open(run.model).shape),
        *save_lines(run, num_steps, steps_per_epoch),
        *preview_lines(run, listing, num_steps),
        *changed_lines(run),
    ]


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


def preview_lines(run: Run, listing: Listing, num_steps: int) -> list[str]:
    """How many previews are painted, and when."""
    count, table = len(listing.manifest.previews), run.sampling
    if not count:
        return ["previews: none (no sample_prompts, no validation_prompt)"]
    every = (
        f"every {table.sample_every_n_epochs} epochs"
        if table.sample_every_n_epochs is not None
        else f"every {table.sample_every_n_steps} steps"
    )
    return [f"previews: {count}, {every}{' and at the start' if table.sample_at_first else ''}"]


def changed_lines(run: Run) -> list[str]:
    """Every key that differs from its default, and where that was said."""
    settings = resolved.changed(run)
    return ["settings that differ from their defaults:"] + [
        f"  {setting.place} = {setting.value}  ({setting.origin})" for setting in settings
    ]


def module_lines(run: Run) -> list[str]:
    """Every module that would be trained, with its rank, alpha and parameters."""
    settled = plan_network(run.network, linear_shapes(Base.open(run.model).shape))
    found, total = [], 0
    for target in settled.targets:
        count = target.rank * (target.in_features * len(target.groups) + target.trained_rows)
        total += count
        found.append(
            f"{target.module:<40} {target.in_features} -> {target.trained_rows}  rank {target.rank}, "
            f"alpha {target.alpha:g}, {count} parameters"
        )
    if settled.x_embedder:
        found.append("img_in (x_embedder)                      in full")
    return [*found, f"{len(found)} modules; {total} parameters in low rank, {4 * total / 1e6:.1f} MB in fp32"]
