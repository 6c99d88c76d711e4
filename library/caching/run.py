"""The caching command, in order: look, plan, say, encode what is missing, promise it in a manifest."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from library import forecast
from library.caching import preview, upkeep
from library.caching.estimate import Needs, needs_of, refuse_full_disk
from library.caching.session import Session, wanted
from library.caching.tables import bucket_table, subset_table
from library.caching.team import Team
from library.config import resolved
from library.config.run import Run
from library.data import lint
from library.data.ledger import Ledger
from library.data.manifest import config_path, make_manifest, manifest_path, read_manifest, write_manifest
from library.data.plan import Plan, bucketings, make_plan, settled
from library.data.previews import PlannedPreview, plan_previews
from library.data.prompts import PreviewRequest, from_plain, preview_requests
from library.data.recipe import TextEncoding
from library.data.report import Report
from library.data.scope import encodings, scope_of
from library.data.sources import list_images
from library.data.store import Store, entry_facts
from library.errors import CacheError, ConfigError, ModelError
from library.files import atomic_write, disk_error
from library.models.base import Base
from library.models.cost import Work
from library.models.encoders import encoders_of
from library.models.shape import FluxShape

log = logging.getLogger("influx")


def run(run: Run) -> int:
    """Bring the cache up to date with the configuration. Returns the exit code."""
    _check(run)
    if run.command.lint:
        return lint.run(run)
    base = Base.open(run.model)
    scope = scope_of(run, base)
    _probe(scope.folder)
    run, chosen = forecast.settle_encoders(run)
    team = Team.join()
    if not team.leads and (run.command.dry_run or upkeep.is_asked(run.command)):
        return 0
    store = Store(scope.folder)
    with store.locked(log.info) if team.leads else team.waiting():
        images, texts = encodings(run, base, scope)
        session = Session(run, base, scope, store, images, texts, workers_of(run))
        if run.command.dry_run:
            lacking = lacking_class_images(run)
            if lacking:
                log.info("%d class images would be generated in %s", len(lacking), run.cache.class_data_dir)
                session = replace(session, run=without_class_images(run))
            plan = plan_of(session)
            needs = needs_of(plan, session.images, session.texts, store, _widths(session))
            _say(session, plan, needs)
            for line in [*chosen, *_forecast(session, needs, lacking)]:
                log.info("%s", line)
            return 0
        if upkeep.is_asked(run.command):
            return upkeep.upkeep(session, plan_of(session, rehash=run.command.verify))
        lacking = lacking_class_images(run)
        if lacking:
            _bring_up_to_date(replace(session, run=without_class_images(run)), team, promise=False)
            if team.leads:
                _make_class_images(session, lacking)
            team.meet()
        _bring_up_to_date(session, team)
        if run.command.preview is not None and team.leads:
            preview.write(session, plan_of(session), run.command.preview, run.command.preview_items)
    return 0


def _check(run: Run) -> None:
    if not run.datasets or not any(dataset.subsets for dataset in run.datasets):
        raise ConfigError("no data set: add [[datasets]] with [[datasets.subsets]], or instance_data_dir")
    if run.command.preview is not None:
        if run.command.preview.is_dir():
            raise ConfigError(f"preview = {run.command.preview}: a folder; name the HTML file to write")
        _probe(run.command.preview.parent)


def _probe(folder: Path) -> None:
    """Find out that nothing can be written there before anything slow starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    probe = folder / f".probe-{os.getpid()}"
    atomic_write(probe, b"")
    probe.unlink(missing_ok=True)


def workers_of(run: Run) -> int:
    """Threads that hash, decode and resize."""
    if run.cache.cache_workers is not None:
        return max(1, run.cache.cache_workers)
    return max(1, min(8, (os.cpu_count() or 2) - 1))


def plan_of(session: Session, *, rehash: bool = False) -> Plan:
    """Look at the data and the previews; what was learnt is kept even if they are refused."""
    run, ledger, report = session.run, Ledger(session.scope.folder / "files.json"), Report()
    with tqdm(desc="looking at images", unit="image", disable=None, leave=False) as bar:
        try:
            requests = preview_requests(run.sampling, report)
            plan = make_plan(
                run.datasets,
                run.cache,
                session.images,
                ledger,
                seed=session.scope.seed,
                workers=session.workers,
                rehash=rehash,
                progress=bar.update,
                report=report,
            )
            previews = _planned_previews(session, plan, ledger, requests, report)
            return settled(replace(plan, previews=previews), report, run.cache.skip_bad)
        finally:
            ledger.save()


def _planned_previews(
    session: Session, plan: Plan, ledger: Ledger, asked: tuple[PreviewRequest, ...], report: Report
) -> tuple[PlannedPreview, ...]:
    """The previews this run asks for, then those that other runs asked for on the same data, as far as they can still
    be made: two experiments may share a cache without taking each other's prompts out. --force forgets the others."""
    run = session.run

    def planned(requests: tuple[PreviewRequest, ...], told: Report) -> tuple[PlannedPreview, ...]:
        first = {item.first.look.mode: item.first.pair.source for item in reversed(plan.items)}
        bucketing, most = bucketings(run.datasets[0])[0], run.cache.max_image_pixels
        return plan_previews(requests, run.datasets, bucketing, session.images, ledger, most, first, told)

    found = planned(asked, report)
    path = manifest_path(session.scope.folder, session.scope.config)
    if not path.is_file() or run.command.force:
        return found
    with contextlib.suppress(CacheError):
        for preview in read_manifest(path).previews:
            request, theirs = from_plain(preview.request), Report()
            if request not in asked:
                made = planned((request,), theirs)
                found += () if theirs.problems else made
    return found


def lacking_class_images(run: Run) -> list[int]:
    """Numbers of the class images that prior preservation still needs."""
    cache = run.cache
    if not cache.with_prior_preservation or cache.class_data_dir is None:
        return []
    there = list_images(cache.class_data_dir, False, Report()) if cache.class_data_dir.is_dir() else {}
    taken = {stem for stem in there if stem.startswith("class_")}
    free = (number for number in count() if f"class_{number:05}" not in taken)
    return list(islice(free, max(0, cache.num_class_images - len(there))))


def without_class_images(run: Run) -> Run:
    """The same run but for the subset of class images, of which there are none yet."""
    folder = run.cache.class_data_dir
    datasets = tuple(
        dataset.model_copy(
            update={"subsets": tuple(one for one in dataset.subsets if not (one.is_reg and one.image_dir == folder))}
        )
        for dataset in run.datasets
    )
    return run.model_copy(update={"datasets": datasets})


def _make_class_images(session: Session, numbers: list[int]) -> None:
    from library.caching.class_images import generate

    run, chosen = forecast.settle(session.run, session.base.shape, work=_class_images(session))
    for line in chosen:
        log.info("%s", line)
    session = replace(session, run=run)
    generate(session, numbers, Ledger(session.scope.folder / "files.json"))


def _class_images(session: Session) -> Work:
    """The painting of class images."""
    run = session.run
    size, count = bucketings(run.datasets[0])[0].size, run.cache.sample_batch_size
    return forecast.painting_of(run, [size] * count, count, encoders=encoders_of(session.base))


def _forecast(session: Session, needs: Needs, lacking: list[int]) -> list[str]:
    """What encoding will need and take."""
    work = _class_images(session) if lacking else None
    shape = session.base.shape if work is not None else None
    return forecast.caching_lines(
        session.run,
        len(needs.captions),
        needs.canvases,
        needs.num_bytes,
        shutil.disk_usage(session.scope.folder).free,
        2 * session.workers,
        encoders_of(session.base),
        shape,
        work,
    )


def _bring_up_to_date(session: Session, team: Team, *, promise: bool = True) -> None:
    run, store = session.run, session.store
    plan = plan_of(session) if team.leads else None
    team.meet()
    if plan is None:
        plan = plan_of(session)
        store.reload()
    if run.command.force:
        store.forget(wanted(plan, session.texts))
    needs = needs_of(plan, session.images, session.texts, store, _widths(session))
    if team.leads:
        _say(session, plan, needs)
        refuse_full_disk(needs, session.scope.folder)
    if not needs.is_empty:
        from library.caching.encode import encode_images, encode_previews, encode_texts

        encode_texts(session, team.share(needs.captions))
        encode_images(session, team.share(needs.recipes))
        encode_previews(session, team.share(needs.previews))
    team.meet()
    if team.leads and promise:
        _promise(session, plan, needs)
    team.meet()


def _promise(session: Session, plan: Plan, needs: Needs) -> None:
    store = session.store
    store.reload()
    store.save_index()
    manifest = make_manifest(
        plan, session.scope.config, session.images.vae, session.texts, lost_words(store, plan, session.texts)
    )
    path = write_manifest(session.scope.folder, manifest)
    atomic_write(config_path(path), resolved.resolved_toml(session.run))
    for text in manifest.texts:
        if text.lost:
            log.warning("caption too long, T5 does not see %r: %s", text.lost, text.caption[:80])
    done = len(needs.recipes) + len(needs.captions) + len(needs.previews)
    log.info("cache is up to date: %d encoded, %d were fresh (%s)", done, needs.num_fresh, session.scope.folder)


def lost_words(store: Store, plan: Plan, texts: TextEncoding) -> dict[str, str]:
    """What was cut off each caption, from the shards' own facts."""
    names = {store.where[texts.fingerprint(caption)] for caption in plan.captions}
    facts = [fact for name in sorted(names) for fact in entry_facts(store.folder / name).values()]
    return {fact["caption"]: fact["lost"] for fact in facts if fact["lost"]}


def _say(session: Session, plan: Plan, needs: Needs) -> None:
    for notice in plan.notices:
        log.info("note: %s", notice)
    log.info("%s", bucket_table(plan))
    log.info("%s", subset_table(session.run.datasets, plan, session.scope.seed))
    log.info("%s", needs.summary(shutil.disk_usage(session.scope.folder).free))


def _widths(session: Session) -> tuple[int, int]:
    """Widths of T5's and CLIP's embeddings, for the estimate; FLUX's where the transformer is not on this machine."""
    try:
        shape = session.base.shape
    except ModelError:
        shape = FluxShape()
    return shape.text_width, shape.pooled_width
