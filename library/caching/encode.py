"""Encoding as a pipeline: threads decode and cut, the device encodes, another thread writes shards.

Pictures are encoded one size after the other; a finished shard is on the disk before the next one of its size is begun,
so a kill loses what was being written and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.data.pixels import ItemPixels, item_pixels, preview_item
from library.data.previews import PlannedPreview
from library.data.recipe import Recipe
from library.data.store import IMAGES_PER_SHARD, SHARD_BYTES, TEXTS_PER_SHARD, Entry, Store
from library.flow import draws
from library.memory.device import choose_device, release

if TYPE_CHECKING:
    from library.caching.session import Session
    from library.models.text import TextEncoders
    from library.models.vae import Vae

MOST_HELD_BYTES = 2 * SHARD_BYTES  # of all sizes together: streamed data comes in any order
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ShardWriter:
    """Collects entries of one kind by size, and writes full shards in the background."""

    def __init__(self, store: Store, kind: str, most: int):
        self.store = store
        self.kind = kind
        self.most = most
        self.num_bytes = 0
        self._held: dict[tuple[int, int] | None, list[Entry]] = {}
        self._sizes: dict[tuple[int, int] | None, int] = {}
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def add(self, entry: Entry, bucket: tuple[int, int] | None = None) -> None:
        """Take an entry; full shards are sent to the disk, and the largest one when too much is held."""
        self._held.setdefault(bucket, []).append(entry)
        self._sizes[bucket] = self._sizes.get(bucket, 0) + entry.num_bytes
        self.num_bytes += entry.num_bytes
        if len(self._held[bucket]) == self.most or self._sizes[bucket] >= SHARD_BYTES:
            self._send(bucket)
        elif sum(self._sizes.values()) >= MOST_HELD_BYTES:
            self._send(max(self._sizes, key=lambda key: self._sizes[key]))

    def finish(self, bucket: tuple[int, int] | None) -> None:
        """No more of this size will come."""
        if bucket in self._held:
            self._send(bucket)

    def _send(self, bucket: tuple[int, int] | None) -> None:
        self._wait()
        del self._sizes[bucket]
        self._writing = self._pool.submit(self.store.add, self.kind, bucket, self._held.pop(bucket))

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Write what is left and wait for the disk. An error of the writer is raised here or at the next shard."""
        for bucket in list(self._held):
            self._send(bucket)
        self._wait()
        self._pool.shutdown()


def encode_texts(session: Session, captions: list[str]) -> None:
    """Encode captions that are not in the cache; the text encoders are gone from memory afterwards."""
    if not captions:
        return
    device = choose_device(session.run.training.device)
    encoders = load_text_encoders(session, device)
    writer = ShardWriter(session.store, "text", TEXTS_PER_SHARD)
    size = encoders.captions_at_once if encoders.layerwise else session.run.cache.text_encoder_batch_size
    with tqdm(total=len(captions), desc="captions", unit="caption", disable=None) as bar:
        for start in range(0, len(captions), size):
            for entry in text_entries(session, encoders, captions[start : start + size]):
                writer.add(entry)
                bar.update()
    writer.close()
    del encoders
    release(device)


def load_text_encoders(session: Session, device: torch.device) -> TextEncoders:
    """CLIP-L and T5 at the chosen precision."""
    from library.models.text import wants_layerwise

    precision = session.texts.precision
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    layerwise = wants_layerwise(session.run.cache.t5xxl_layer_by_layer, device)
    return session.base.load_text_encoders(device, dtype, layerwise, precision)


def text_entries(session: Session, encoders: TextEncoders, captions: list[str]) -> Iterator[Entry]:
    """The entries of a batch of captions."""
    stored = torch.float32 if session.texts.precision == "fp32" else torch.bfloat16
    encoded = encoders.encode(captions, session.texts.length)
    for row, caption in enumerate(captions):
        tensors = {
            "t5": encoded.embeddings.t5[row].to("cpu", stored),
            "pooled": encoded.embeddings.pooled[row].to("cpu", stored),
            "t5_ids": encoded.t5_ids[row].to("cpu", torch.int32),
            "clip_ids": encoded.clip_ids[row].to("cpu", torch.int32),
        }
        facts = {"caption": caption, "lost": encoded.truncated[row], "made_of": asdict(session.texts)}
        yield Entry(session.texts.fingerprint(caption), {name: part.clone() for name, part in tensors.items()}, facts)


def encode_images(session: Session, recipes: list[Recipe]) -> None:
    """Encode image entries that are not in the cache; the VAE is gone from memory afterwards."""
    if not recipes:
        return
    device = choose_device(session.run.training.device)
    vae = load_vae(session, device)
    writer = ShardWriter(session.store, "image", IMAGES_PER_SHARD)
    batch_size = session.run.cache.vae_batch_size
    last, streams = None, any(recipe.pair.source.blob.streams for recipe in recipes)
    with tqdm(total=len(recipes), desc="images", unit="image", disable=None) as bar:
        for group in _batched(_decoded(recipes, session.workers), batch_size):
            if not streams and group[0][0].size != last:
                writer.finish(last)
            last = group[0][0].size
            for entry, recipe in zip(image_entries(vae, group, batch_size), (recipe for recipe, _ in group)):
                writer.add(entry, recipe.size)
                bar.update()
            bar.set_postfix_str(f"{writer.num_bytes / 1e6:.0f} MB", refresh=False)
    writer.close()
    del vae
    release(device)


def encode_previews(session: Session, previews: list[PlannedPreview]) -> None:
    """Encode the conditions of previews that are not in the cache."""
    if not previews:
        return
    device = choose_device(session.run.training.device)
    vae = load_vae(session, device)
    writer = ShardWriter(session.store, "image", IMAGES_PER_SHARD)
    for preview in tqdm(previews, desc="previews", unit="image", disable=None):
        item = preview_item(preview)
        mean, _ = vae.encode(item.condition_pixels()[None])
        tensors = {"condition.0": mean[0].cpu().bfloat16()} | _mask_tensors(ItemPixels([item], None))
        facts = {"name": preview.request.prompt[:200], "mode": preview.mode, "size": preview.size, "preview": True}
        writer.add(Entry(preview.fingerprint, tensors, facts), preview.size)
    writer.close()
    del vae
    release(device)


def load_vae(session: Session, device: torch.device) -> Vae:
    """The VAE's encoder at the chosen precision."""
    vae = session.base.load_vae(device, DTYPES[session.images.dtype], parts="encoder")
    if session.images.tiling:
        vae.tile()
    return vae


def _decoded(recipes: list[Recipe], workers: int) -> Iterator[tuple[Recipe, ItemPixels]]:
    """Each recipe with its pixels, in order; threads work a little ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[Recipe, Future[ItemPixels]]] = deque()
        waiting = iter(recipes)
        try:
            while True:
                while len(ahead) < 2 * workers and (recipe := next(waiting, None)) is not None:
                    ahead.append((recipe, pool.submit(item_pixels, recipe)))
                if not ahead:
                    return
                recipe, future = ahead.popleft()
                yield recipe, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batched(decoded: Iterator[tuple[Recipe, ItemPixels]], size: int) -> Iterator[list[tuple[Recipe, ItemPixels]]]:
    """Groups of up to ``size`` recipes of one picture size."""
    group: list[tuple[Recipe, ItemPixels]] = []
    for recipe, pixels in decoded:
        if group and (len(group) == size or group[0][0].size != recipe.size):
            yield group
            group = []
        group.append((recipe, pixels))
    if group:
        yield group


def image_entries(vae: Vae, group: list[tuple[Recipe, ItemPixels]], batch_size: int) -> list[Entry]:
    """Encode the targets and conditions of a group of one size."""
    pictures: list[Tensor] = []
    for _, pixels in group:
        pictures += [pixels.items[0].target, *_distinct_conditions(pixels)]
    encoded = [vae.encode(torch.stack(pictures[at : at + batch_size])) for at in range(0, len(pictures), batch_size)]
    means = torch.cat([mean.cpu() for mean, _ in encoded])
    deviations = torch.cat([std.cpu() for _, std in encoded])
    entries, row = [], 0
    for recipe, pixels in group:
        count = len(_distinct_conditions(pixels))
        tensors = _target_tensors(recipe, means[row], deviations[row])
        for number in range(count):
            tensors[f"condition.{number}"] = means[row + 1 + number].bfloat16()
        row += 1 + count
        entries.append(Entry(recipe.fingerprint, tensors | _mask_tensors(pixels), entry_facts_of(recipe)))
    return entries


def _distinct_conditions(pixels: ItemPixels) -> list[Tensor]:
    """What the VAE encodes: where nothing is blanked, all variants share one condition image."""
    if not pixels.items[0].blanked:
        return [pixels.items[0].condition_pixels()]
    return [item.condition_pixels() for item in pixels.items]


def _target_tensors(recipe: Recipe, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    if recipe.encoding.latents_as == "distribution":
        return {"target.mean": mean.bfloat16(), "target.std": deviation.bfloat16()}
    if recipe.encoding.latents_as == "mean":
        return {"target.mean": mean.bfloat16()}
    noise = draws.normal(tuple(mean.shape), 0, "cached sample", recipe.fingerprint)
    return {"target.sample": (mean + deviation * noise).bfloat16()}


def _mask_tensors(pixels: ItemPixels) -> dict[str, Tensor]:
    """Masks at one bit a pixel; the value of a constant edit mask that is neither black nor white beside them."""
    found = {}
    for number, item in enumerate(pixels.items):
        bits = np.packbits(item.mask[0].numpy() > 0, axis=-1)
        found[f"mask.{number}"] = torch.from_numpy(bits)
    top = float(pixels.items[0].mask.max())
    if top not in (0.0, 1.0):
        found["mask_value"] = torch.tensor([top])
    if pixels.changed is not None:
        found["changed"] = pixels.changed
    return found


def entry_facts_of(recipe: Recipe) -> dict:
    """What an entry says about itself in its shard's header."""
    return {
        "name": recipe.pair.key,
        "mode": recipe.mode.name,
        "size": recipe.size,
        "picture_size": recipe.pair.frame,
        "made_of": recipe.content,
    }
