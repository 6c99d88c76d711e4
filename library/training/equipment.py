"""What a run shows and writes, put together from its tables: keeper, painter, logbook, measurements."""

import logging
from collections.abc import Iterator
from functools import partial

import torch

from library.config import resolved
from library.data.batches import Batch
from library.models.flux import FluxTransformer
from library.networks.metadata import now
from library.networks.size import file_rank
from library.previews import PreviewSettings
from library.training import trackers
from library.training.conduct import Conduct
from library.training.description import describe_run, file_dtype
from library.training.facts import bucket_counts, data_facts, dataset_facts
from library.training.keeper import Keeper
from library.training.logbook import Logbook
from library.training.loop import Trainer
from library.training.outlook import outlook
from library.training.pictures import Painter
from library.training.site import Site
from library.training.validation import measure

log = logging.getLogger(__name__)
VAE_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def equip(site: Site, trainer: Trainer, transformer: FluxTransformer) -> Conduct:
    """Everything around the steps."""
    run, folder, trained = site.run, site.start.folder, trainer.trained
    buckets = bucket_counts(site.dataset)
    num_steps, step = trainer.schedule.num_steps, trained.progress.step
    settings = {setting.place: str(setting.value) for setting in resolved.changed(run)}
    record = site.output.record() if site.output is not None else None
    identity = trackers.run_id(site.start.identity, site.start.seed, None if record is None else record.started)
    opened = trackers.build(run.logging, folder, run.saving.output_name, settings, step, identity)
    logbook = Logbook(folder, opened, run.logging.log_every_n_steps, step, num_steps)
    held_out = partial(_measure, site, trainer) if site.dataset.held_out_items and not site.sharded else None
    if site.sharded and (site.dataset.previews or site.dataset.held_out_items):
        # they would run on this process alone, and a split base needs all of them
        log.warning("the base is split over the processes: previews and validation are left out")
    return Conduct(
        run,
        folder,
        trained,
        _keeper(site, trainer),
        logbook,
        num_steps,
        dataset_facts(site.dataset, buckets),
        Painter(
            site.dataset,
            site.base,
            preview_settings(site),
            folder,
            transformer,
            run.validation.validation_generate,
            idle=site.sharded,
            pooled=trainer.predict.pooled if run.network.train_text_encoder else None,
            check=site.stop.check,
        ),
        held_out,
    )


def _keeper(site: Site, trainer: Trainer) -> Keeper:
    run, trained, facts = site.run, trainer.trained, data_facts(site.dataset)
    if len(facts.edit_mask_values) > 1:
        values = ", ".join(f"{value:g}" for value in facts.edit_mask_values)
        log.warning(
            "edit_mask_value is %s in different subsets; the network's file says %g, the commonest, and inference obeys"
            " it: use --edit_mask_value there for the others",
            values, facts.edit_mask_values[0],
        )  # fmt: skip
    describe = partial(
        describe_run, run, site.base, trained.network, trained.progress, site.start.seed, now(), facts,
        file_rank(outlook(run, site.base).plan),
    )  # fmt: skip
    progress = trained.progress
    return Keeper(
        run.saving,
        site.start.folder,
        trained,
        file_dtype(run, site.mixed),
        site.start.seed,
        site.start.identity,
        describe,
        lambda: trainer.data.epochs.segments(progress.epoch, progress.position),
    )


def preview_settings(site: Site) -> PreviewSettings:
    """What previews are made with: the configuration's values, else the base's."""
    table, defaults = site.run.sampling, site.base.defaults
    return PreviewSettings(
        steps=table.sample_steps or defaults.sample_steps,
        guidance=defaults.sample_guidance_scale if table.sample_guidance_scale is None else table.sample_guidance_scale,
        seed=site.start.seed if table.sample_seed is None else table.sample_seed,
        name=site.run.saving.output_name,
        vae_dtype=VAE_PRECISIONS[site.run.cache.vae_dtype],
        vae_tiling=site.run.cache.vae_tiling,
    )


def _until_stopped(site: Site, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        site.stop.check()
        yield batch


def _measure(site: Site, trainer: Trainer) -> dict[str, float]:
    table = site.run.validation
    batches = _until_stopped(site, site.dataset.held_out_batches(table.max_validation_steps))
    guidance = site.run.training.guidance_scale
    return measure(trainer.predict, batches, table.validation_timesteps, site.start.seed, guidance, site.device)
