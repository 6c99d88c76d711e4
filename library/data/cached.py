"""The trainer's side of the cache: opened by configuration, refused with the command to run if it is not up to date."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from library.conditioning import MODES
from library.conditioning.item import Condition
from library.config.run import Run
from library.config.tables import SubsetTable
from library.data import readers
from library.data.batches import Batch, Choice, Chooser, Gatherer, Use, gather_items, prefetched
from library.data.listing import Listing, listed
from library.data.manifest import ManifestItem, ManifestPreview
from library.data.order import BatchPlan, Order
from library.data.plan import all_subsets
from library.data.prompts import PreviewRequest, from_plain
from library.data.reader import Reader
from library.data.scope import cache_folder
from library.data.shares import Share
from library.models.text import TextEmbeddings

PREFETCH = 2
HELD_OUT_BATCH = 4
"""Held-out items measured or painted at once."""


@dataclass(frozen=True)
class CachedPreview:
    """One preview, encoded: batches of one. negative: the negative prompt's text, None if there is none.

    The seed of its noise is the request's (or the run's) plus request.copy. text_entry: the text's place in the cache.
    target: latents of what the data says it should become, where the data has this very task.
    """

    request: PreviewRequest
    mode: str
    text: TextEmbeddings
    negative: TextEmbeddings | None
    condition: Condition
    text_entry: str = ""
    target: Tensor | None = None


class CachedDataset:
    """Items in the cache, as batches. Make one with `open_cache`."""

    def __init__(
        self,
        listing: Listing,
        seed: int,
        prior: float,
        reading: readers.Reading | None = None,
        sample_items: int = 0,
    ):
        """prior: weight of regularisation items. sample_items: how many items are previews too."""
        self.listing = listing
        self.sample_items = sample_items
        self.reading = reading
        self.manifest = listing.manifest
        self.reader = Reader(listing.store)
        self.seed = seed
        self.datasets = listing.datasets
        self.items = listing.items
        self.held_out_items = listing.held_out_items
        uses = [use_of(subset, prior) for subset in all_subsets(listing.datasets)]
        self._chooser = Chooser(self.reader, self.manifest.texts, uses, seed)
        self._gatherer = Gatherer(self.reader)

    @property
    def shares(self) -> list[Share]:
        """Each subset's items, repeats and share of an epoch."""
        return self.listing.shares

    @cached_property
    def order(self) -> Order:
        """The sequence of training batches."""
        return Order(self.listing.members, self.seed)

    def batch(self, position: int) -> Batch:
        """The batch at a position of the run (its micro-step number)."""
        return self.read(self.order.batch(position))

    def read(self, plan: BatchPlan) -> Batch:
        """The batch of any plan over `items`; what is drawn is keyed by its position."""
        return gather_items(self._chooser, self._gatherer, [self.items[number] for number in plan.items], plan)

    def batches(self, positions: Iterable[int], depth: int = PREFETCH) -> Iterator[Batch]:
        """The batches at these positions, read ahead by a background thread."""
        return prefetched(self.batch, positions, depth)

    def held_out_batches(self, most_items: int | None = None) -> Iterator[Batch]:
        """Held-out items in the order of their keys, batched by size; always the first variant and caption of each."""
        groups: dict[tuple, list[ManifestItem]] = {}
        for item in sorted(self.held_out_items, key=lambda item: item.key)[:most_items]:
            groups.setdefault(self.reader.store.bucket(item.sizes[0][0]), []).append(item)
        for items in groups.values():
            for start in range(0, len(items), HELD_OUT_BATCH):
                chosen = [self._chooser.first(item) for item in items[start : start + HELD_OUT_BATCH]]
                yield self._gatherer.gather(chosen, 0)

    @cached_property
    def previews(self) -> tuple[CachedPreview, ...]:
        """What to paint for previews, in the order in which it was asked for; items of the data come last."""
        asked = [self._preview(preview) for preview in self.manifest.previews]
        return (*asked, *(self._item_preview(item) for item in self._shown_items()))

    def _preview(self, preview: ManifestPreview) -> CachedPreview:
        choice = Choice("", preview.entry, 0, self.manifest.texts[0], 1.0)
        negative = None if preview.negative is None else self._gatherer.text(preview.negative)
        condition = self._gatherer.condition([choice])
        text, request = self._gatherer.text(preview.text), from_plain(preview.request)
        target = self._target_of(request, preview)
        return CachedPreview(request, preview.mode, text, negative, condition, preview.text, target)

    def _target_of(self, request: PreviewRequest, preview: ManifestPreview) -> Tensor | None:
        """A preview that starts from the data's first item and asks for what that item does has its target."""
        if not request.from_data or request.image is not None:
            return None
        subsets = all_subsets(self.datasets)
        first = next((item for item in self.manifest.items if subsets[item.subset].mode == preview.mode), None)
        if first is None or preview.text not in [self.manifest.texts[number].fingerprint for number in first.texts]:
            return None
        return self._gatherer.gather([self._chooser.first(first)], 0).mean.float()

    def _shown_items(self) -> list[ManifestItem]:
        """Items that are previews: held-out ones first, and of each kind one of every subset in turn."""
        subsets = all_subsets(self.datasets)
        places: Counter[tuple[bool, int]] = Counter()
        ranked = []
        for held_out, items in ((True, self.held_out_items), (False, self.items)):
            for item in items:
                if not subsets[item.subset].is_reg:
                    ranked.append(((not held_out, places[held_out, item.subset], item.subset), item))
                    places[held_out, item.subset] += 1
        return [item for _, item in heapq.nsmallest(self.sample_items, ranked, key=lambda one: one[0])]

    def _item_preview(self, item: ManifestItem) -> CachedPreview:
        choice = self._chooser.first(item)
        batch = self._gatherer.gather([choice], 0)
        mode = all_subsets(self.datasets)[item.subset].mode
        request = PreviewRequest(choice.text.caption)
        return CachedPreview(
            request, mode, batch.text, None, batch.condition, choice.text.fingerprint, batch.mean.float()
        )

    @property
    def empty_text(self) -> TextEmbeddings:
        """The embeddings of the empty prompt."""
        return self._gatherer.text(self.manifest.texts[0].fingerprint)

    def close(self) -> None:
        """Close the shards."""
        self.reader.close()
        if self.reading is not None:
            self.reading.close()


def use_of(subset: SubsetTable, prior: float) -> Use:
    """How the items of a subset are drawn from. prior: the weight of regularisation items."""
    return Use(
        subset.caption_dropout_rate,
        subset.caption_dropout_every_n_epochs,
        subset.full_mask_rate if "mask" in MODES[subset.mode].takes else 0.0,  # spatial's variants are its two halves
        prior if subset.is_reg else 1.0,
    )


def open_cache(run: Run, seed: int | None = None) -> CachedDataset:
    """The cached data set of a configuration. Raises CacheError, naming the command to run, if it is not up to date.

    seed: of what is drawn in training (order, captions, variants); the configured one, or 0, if not given. What the
    cache itself was drawn with, the split included, is the configuration's in any case: the caching command knows no
    other.
    Until it is closed, or this process ends, --gc leaves the shards it counts on.
    """
    reading = readers.begin(cache_folder(run))
    try:
        listing = listed(run)
        if reading is not None:
            reading.holds(listing.store.where[entry] for entry in listing.manifest.fingerprints)
    except BaseException:
        if reading is not None:
            reading.close()
        raise
    drawn_with = (run.training.seed or 0) if seed is None else seed
    return CachedDataset(listing, drawn_with, run.training.prior_loss_weight, reading, run.sampling.sample_items)
