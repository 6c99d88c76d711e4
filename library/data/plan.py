"""Configuration and files -> what the cache has to hold. No torch, no model: `--dry_run` and `--status` end here.

The plan names every item, every entry it needs by fingerprint, and every caption; the caching command encodes what is
missing, and the manifest made of the plan is what the trainer reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.conditioning import MODES, ModeSettings
from library.config.tables import CacheTable, DatasetTable, SubsetTable
from library.data.buckets import Bucketing
from library.data.captions import CaptionSettings, variants
from library.data.chance import chance
from library.data.footprint import Footprint, footprint_of
from library.data.geometry import Geometry, crop_box
from library.data.ledger import Ledger
from library.data.masks import MaskSettings
from library.data.pairs import Pair, blobs_of, contradictions, pair
from library.data.previews import PlannedPreview
from library.data.recipe import ImageEncoding, Look, Recipe, make_recipe
from library.data.records import Record
from library.data.report import Report
from library.data.sources import records

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class PlannedItem:
    """One item of a subset. captions: the texts to draw among. sizes: per resolution, the entries to draw among."""

    key: str
    subset: int
    captions: tuple[str, ...]
    sizes: tuple[tuple[Recipe, ...], ...]

    @property
    def first(self) -> Recipe:
        """Its first entry: every other one is made of the same pictures."""
        return next(self.recipes)

    @property
    def recipes(self) -> Iterator[Recipe]:
        """All its entries."""
        return (recipe for choices in self.sizes for recipe in choices)


@dataclass(frozen=True)
class Plan:
    """Everything that one configuration needs in the cache."""

    items: tuple[PlannedItem, ...]
    subset_names: tuple[str, ...]
    notices: tuple[str, ...]
    previews: tuple[PlannedPreview, ...] = ()
    footprint: Footprint = field(default_factory=Footprint)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Distinct image entries by fingerprint."""
        return {recipe.fingerprint: recipe for item in self.items for recipe in item.recipes}

    @property
    def captions(self) -> list[str]:
        """Distinct captions, the empty one first: dropout needs it."""
        of_items = (text for item in self.items for text in item.captions)
        of_previews = (text for preview in self.previews for text in preview.texts)
        return list(dict.fromkeys(["", *of_items, *of_previews]))


def subset_names(datasets: tuple[DatasetTable, ...]) -> tuple[str, ...]:
    """A short name for each subset, from its folder; numbered where two are alike."""
    taken: Counter[str] = Counter()
    names = []
    for subset in all_subsets(datasets):
        place = subset.image_dir or subset.metadata_file
        base = Path(place).stem if place is not None else str(subset.dataset_name or "subset").rsplit("/", 1)[-1]
        taken[base] += 1
        names.append(base if taken[base] == 1 else f"{base}-{taken[base]}")
    return tuple(names)


def all_subsets(datasets: tuple[DatasetTable, ...]) -> list[SubsetTable]:
    """The subsets of all data sets in order; their number in this list is how items refer to them."""
    return [subset for dataset in datasets for subset in dataset.subsets]


def make_plan(
    datasets: tuple[DatasetTable, ...],
    cache: CacheTable,
    encoding: ImageEncoding,
    ledger: Ledger,
    *,
    seed: int = 0,
    workers: int = 1,
    rehash: bool = False,
    progress: Callable[[int], None] = lambda count: None,
    report: Report | None = None,
) -> Plan:
    """Look at everything the user named. Raises DataError with all that is bad at once (see skip_bad).

    report: where that goes instead if the caller has more to look at; `settled` then has the last word.
    """
    alone = report is None
    report = report or Report()
    names = subset_names(datasets)
    if not names:
        report.bad("the configuration", "names no data: add [[datasets]] with [[datasets.subsets]]")
    listed: list[list[Record]] = []
    footprint = footprint_of(datasets)
    for subset, name in zip(all_subsets(datasets), names, strict=True):
        for text in contradictions(subset):
            report.bad(f"subset {name}", text)
        listed.append(records(subset, report))
    blobs = [blob for subset_records in listed for record in subset_records for blob in blobs_of(record)]
    known = ledger.look(blobs, cache.max_image_pixels, workers=workers, rehash=rehash, progress=progress)
    items, number = [], 0
    for dataset in datasets:
        for subset in dataset.subsets:
            texts, name = caption_settings(subset, seed), names[number]
            planner = _Planner(dataset, subset, number, cache, encoding, seed)
            found = (pair(record, name, subset, known, texts, report) for record in listed[number])
            own = [planner.item(checked, texts) for checked in found if checked is not None]
            _say_idle(subset, name, own, report)
            items += own
            number += 1
    plan = Plan(tuple(items), names, (), footprint=footprint)
    return settled(plan, report, cache.skip_bad) if alone else plan


def settled(plan: Plan, report: Report, skip_bad: bool) -> Plan:
    """The plan with all that was noticed. Raises DataError if there is something bad that is not skipped."""
    report.stop_if_bad(skip_bad)
    if not plan.items:
        report.bad("the data set", "no item is left")
        report.stop_if_bad(False)
    return replace(plan, notices=tuple(report.notices))


def _say_idle(subset: SubsetTable, name: str, items: list[PlannedItem], report: Report) -> None:
    """Keys about masks that cannot act, where only the items show it: a table has a column of masks or none."""
    if subset.metadata_file is None or not items or "mask" not in MODES[subset.mode].takes or subset.generate_mask:
        return
    masked = items[0].first.pair.mask is not None
    keys = ("edit_mask_value",) if masked else ("full_mask_rate", "mask_dilation", "mask_jitter", "invert_mask")
    for key in keys:
        if subset.changed(key):
            report.notice(f"{key} does nothing here: the items of {name} have {'masks' if masked else 'no masks'}")


def caption_settings(subset: SubsetTable, seed: int) -> CaptionSettings:
    """What a subset does to its captions."""
    return CaptionSettings(
        prefix=subset.caption_prefix,
        suffix=subset.caption_suffix,
        separator=subset.caption_separator,
        shuffle=subset.shuffle_caption,
        variants=subset.caption_variants,
        keep_tokens=subset.keep_tokens,
        tag_dropout=subset.caption_tag_dropout_rate,
        allow_empty=subset.allow_empty_captions,
        per_line=subset.caption_per_line,
        seed=seed,
    )


def look_of(subset: SubsetTable, max_pixels: int, seed: int) -> Look:
    """What a subset does to its pictures and masks."""
    masks = MaskSettings(
        kinds=subset.generate_mask,
        variants=subset.mask_variants,
        with_full=subset.full_mask_rate > 0,
        dilation=subset.mask_dilation,
        jitter=subset.mask_jitter,
        invert=subset.invert_mask,
        seed=seed,
    )
    settings = ModeSettings(subset.edit_mask_value, subset.mask_only_right)
    return Look(
        subset.mode,
        settings,
        masks,
        subset.size_mismatch,
        subset.background_color,
        subset.resize_interpolation,
        max_pixels,
    )


def bucketings(dataset: DatasetTable) -> list[Bucketing]:
    """How each of a data set's resolutions is cut into buckets."""
    return [
        Bucketing(
            size, dataset.enable_bucket, dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps,
            dataset.bucket_no_upscale,
        )
        for size in dataset.sizes
    ]  # fmt: skip


class _Planner:
    """Makes the items of one subset."""

    def __init__(
        self,
        dataset: DatasetTable,
        subset: SubsetTable,
        number: int,
        cache: CacheTable,
        encoding: ImageEncoding,
        seed: int,
    ):
        self.subset = subset
        self.number = number
        self.encoding = encoding
        self.seed = seed
        self.look = look_of(subset, cache.max_image_pixels, seed)
        self.bucketings = bucketings(dataset)

    def item(self, checked: Pair, texts: CaptionSettings) -> PlannedItem:
        """All entries of a pair: every resolution, crop and mirror image."""
        captions = dict.fromkeys(text for caption in checked.captions for text in variants(caption, checked.key, texts))
        sizes = tuple(tuple(self._recipes(checked, bucketing)) for bucketing in self.bucketings)
        return PlannedItem(checked.key, self.number, tuple(captions), sizes)

    def _recipes(self, checked: Pair, bucketing: Bucketing) -> Iterator[Recipe]:
        width, height = checked.frame
        bucket = bucketing.choose(width, height)
        unscaled = bucketing.keeps_scale(width, height)
        for place in self._places(checked):
            box = crop_box((width, height), bucket, place, unscaled=unscaled)
            for flip in (False, True) if self.subset.flip_aug else (False,):
                yield make_recipe(checked, self.look, Geometry(*bucket, box, flip), self.encoding)

    def _places(self, checked: Pair) -> list[tuple[float, float]]:
        if not self.subset.random_crop:
            return [CENTRE]
        draws = [
            chance("crop", self.seed, checked.source.known.sha256, number)
            for number in range(self.subset.crop_variants)
        ]
        return [(draw.random(), draw.random()) for draw in draws]
