"""Batches out of the cache: one gather per batch, one background thread ahead of the trainer.

What is drawn here (crop or mirror variant, mask, caption, dropout) is keyed by the batch's position and the item, so a
batch is the same whoever reads it, and however far ahead.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from library.conditioning.item import Condition
from library.data.manifest import ManifestItem, Text
from library.data.order import occurrences
from library.data.reader import Reader
from library.flow import draws
from library.models.text import TextEmbeddings

CELL = 8  # pixels of one latent
TEXT_MEMORY = 256 << 20  # bytes of recently used captions kept for batches of one


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU, as it was stored.

    mean, std: (B, 16, h, w) of the target latents; std is None where one fixed latent is cached. condition: its latents
    and mask (B, 1, H, W). text: T5 (B, L, D) and pooled (B, P). clip_ids, t5_ids: (B, 77), (B, L). loss_weight: (B,).
    changed: (B, 1, h, w) in [0, 1], the share of each latent cell that differs between source and target (of the mask,
    where there is only one picture). item_keys, captions: B strings; an item may come twice.
    """

    mean: Tensor
    std: Tensor | None
    condition: Condition
    text: TextEmbeddings
    clip_ids: Tensor
    t5_ids: Tensor
    loss_weight: Tensor
    changed: Tensor
    item_keys: tuple[str, ...]
    captions: tuple[str, ...]
    position: int

    def __len__(self) -> int:
        return len(self.item_keys)

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height in pixels of what the model sees."""
        return self.condition.mask.shape[-1], self.condition.mask.shape[-2]


@dataclass(frozen=True)
class Use:
    """How the items of a subset are drawn from: chances of the empty caption and of the full mask, loss weight."""

    caption_dropout: float = 0.0
    dropout_every_n_epochs: int = 0
    full_mask_rate: float = 0.0
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Choice:
    """What was drawn for one place of a batch: an image entry, which of its condition variants, and a caption."""

    key: str
    entry: str
    condition: int
    text: Text
    loss_weight: float


class Chooser:
    """Draws one of an item's variants."""

    def __init__(self, reader: Reader, texts: tuple[Text, ...], uses: list[Use], seed: int):
        self.reader = reader
        self.texts = texts
        self.uses = uses
        self.seed = seed

    def choose(self, item: ManifestItem, size: int, position: int, occurrence: int, epoch: int) -> Choice:
        """The draw for training. size: the batch's resolution."""
        use = self.uses[item.subset]
        key = (position, item.key, occurrence)
        entries = item.sizes[size]
        entry = entries[draws.choice(len(entries), self.seed, "variant", *key)]
        text = self.texts[item.texts[draws.choice(len(item.texts), self.seed, "caption", *key)]]
        if self._drops_caption(use, epoch, key):
            text = self.texts[0]
        return Choice(item.key, entry, self._condition(entry, use, key), text, use.loss_weight)

    def first(self, item: ManifestItem) -> Choice:
        """The same variant every time, for validation: the first of everything."""
        return Choice(item.key, item.sizes[0][0], 0, self.texts[item.texts[0]], 1.0)

    def _drops_caption(self, use: Use, epoch: int, key: tuple) -> bool:
        every = use.dropout_every_n_epochs
        if every and (epoch + 1) % every == 0:  # kohya's scripts count epochs from 1 as well
            return True
        return use.caption_dropout > 0 and draws.uniform(self.seed, "caption dropout", *key) < use.caption_dropout

    def _condition(self, entry: str, use: Use, key: tuple) -> int:
        count = num_conditions(self.reader, entry)
        if use.full_mask_rate and count > 1:  # the full mask is the last variant
            if draws.uniform(self.seed, "full mask", *key) < use.full_mask_rate:
                return count - 1
            count -= 1
        return draws.choice(count, self.seed, "condition", *key) if count > 1 else 0


def num_conditions(reader: Reader, entry: str) -> int:
    """How many condition variants an entry holds: as many as masks."""
    return sum(part.startswith("mask.") for part in reader.parts(entry))


class Gatherer:
    """Reads what was chosen into the tensors of a batch."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self._recent: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._recent_bytes = 0

    def gather(self, choices: list[Choice], position: int) -> Batch:
        """One batch. All entries are of one size."""
        entries = [choice.entry for choice in choices]
        mean, std = self._targets(entries)
        condition = self.condition(choices)
        texts = [choice.text.fingerprint for choice in choices]
        return Batch(
            mean,
            std,
            condition,
            self._texts(texts),
            self._stack(texts, "clip_ids"),
            self._stack(texts, "t5_ids"),
            torch.tensor([choice.loss_weight for choice in choices]),
            self._changed(entries, condition.mask),
            tuple(choice.key for choice in choices),
            tuple(choice.text.caption for choice in choices),
            position,
        )

    def _stack(self, fingerprints: list[str], part: str | list[str]) -> Tensor:
        """(B, ...) of one part, read straight into place."""
        parts = [part] * len(fingerprints) if isinstance(part, str) else part
        _, dtype, shape = self.reader.parts(fingerprints[0])[parts[0]]
        out = torch.empty((len(fingerprints), *shape), dtype=dtype)
        for row, (fingerprint, name) in enumerate(zip(fingerprints, parts, strict=True)):
            self.reader.read(fingerprint, name, out[row])
        return out

    def _targets(self, entries: list[str]) -> tuple[Tensor, Tensor | None]:
        parts = self.reader.parts(entries[0])
        if "target.std" in parts:
            return self._stack(entries, "target.mean"), self._stack(entries, "target.std")
        return self._stack(entries, "target.sample" if "target.sample" in parts else "target.mean"), None

    def text(self, fingerprint: str) -> TextEmbeddings:
        """The embeddings of one caption, as a batch of one."""
        return self._texts([fingerprint])

    def condition(self, choices: list[Choice]) -> Condition:
        """The chosen condition variants."""
        entries = [choice.entry for choice in choices]
        latents = [
            name if name in self.reader.parts(choice.entry) else "condition.0"
            for choice in choices
            for name in [f"condition.{choice.condition}"]
        ]
        packed = self._stack(entries, [f"mask.{choice.condition}" for choice in choices])
        mask = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1))[:, None]
        if any("mask_value" in self.reader.parts(entry) for entry in entries):
            mask = mask.float() * self._stack(entries, "mask_value").reshape(-1, 1, 1, 1)
        return Condition(self._stack(entries, latents), mask)

    def _changed(self, entries: list[str], mask: Tensor) -> Tensor:
        if all("changed" in self.reader.parts(entry) for entry in entries):
            return self._stack(entries, "changed")[:, None].float() / 255
        shares = functional.avg_pool2d(mask.float(), CELL)
        for row, entry in enumerate(entries):
            if "changed" in self.reader.parts(entry):
                shares[row, 0] = self.reader.read(entry, "changed").float() / 255
        return shares

    def _texts(self, fingerprints: list[str]) -> TextEmbeddings:
        if len(fingerprints) > 1:
            return TextEmbeddings(self._stack(fingerprints, "t5"), self._stack(fingerprints, "pooled"))
        (fingerprint,) = fingerprints
        found = self._recent.pop(fingerprint, None)
        if found is None:
            found = (self.reader.read(fingerprint, "t5"), self.reader.read(fingerprint, "pooled"))
            self._recent_bytes += found[0].nbytes
            while self._recent_bytes > TEXT_MEMORY and self._recent:
                self._recent_bytes -= self._recent.popitem(last=False)[1][0].nbytes
        self._recent[fingerprint] = found
        return TextEmbeddings(found[0][None], found[1][None])


def gather_items(chooser: Chooser, gatherer: Gatherer, items: list[ManifestItem], plan) -> Batch:
    """The batch of a BatchPlan over its items."""
    keys = tuple(item.key for item in items)
    choices = [
        chooser.choose(item, plan.size, plan.position, occurrence, plan.epoch)
        for item, occurrence in zip(items, occurrences(keys), strict=True)
    ]
    return gatherer.gather(choices, plan.position)


def prefetched(load: Callable[[int], Batch], positions: Iterable[int], depth: int = 2) -> Iterator[Batch]:
    """``load`` of each position in order, read ahead by one background thread. An error surfaces at its own batch."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def work() -> None:
        for position in positions:
            try:
                result: Batch | BaseException = load(position)
            except BaseException as error:  # noqa: BLE001  (raised again in the trainer's thread)
                result = error
            if not _put(ready, result, stopped) or isinstance(result, BaseException):
                return
        _put(ready, None, stopped)

    thread = threading.Thread(target=work, name="batch reader", daemon=True)
    thread.start()
    try:
        while (result := ready.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        thread.join()


def _put(ready: queue.Queue, result: object, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(result, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
