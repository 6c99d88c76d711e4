"""Cached latents back into pictures, small enough to travel inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.caching.encode import DTYPES
from library.memory.device import choose_device, release

if TYPE_CHECKING:
    from library.caching.session import Session
    from library.data.reader import Reader
    from library.models.vae import Vae

SIDE = 384  # pixels: larger ones make a page that browsers open slowly
QUALITY = 82
MOST_VIEWS = 4  # condition variants shown of an item
AHEAD = 8  # items whose pictures wait to be compressed


@dataclass(frozen=True)
class View:
    """One condition variant: what the VAE saw of it, and its mask. Both data URIs."""

    condition: str
    mask: str


@dataclass(frozen=True)
class Shown:
    """The pictures of an item, as data URIs. changed: where source and target differ; None without two pictures."""

    target: str
    views: tuple[View, ...]
    changed: str | None


def decoded_pictures(
    session: Session, reader: Reader, entries: Sequence[tuple[int, str]]
) -> Iterator[tuple[int, Shown]]:
    """Decode entries, given with a number each, one picture size after the other."""
    device = choose_device(session.run.training.device)
    vae = session.base.load_vae(device, DTYPES[session.images.dtype], parts="decoder")
    if session.images.tiling:
        vae.tile()
    by_size = sorted(entries, key=lambda entry: reader.store.bucket(entry[1]))
    with ThreadPoolExecutor(session.workers) as pool:
        waiting = []
        for number, entry in by_size:
            pictures = _decode(vae, reader, entry, session.run.cache.vae_batch_size)
            waiting.append((number, pool.submit(_shown, *pictures)))
            if len(waiting) > AHEAD:
                number, future = waiting.pop(0)
                yield number, future.result()
        for number, future in waiting:
            yield number, future.result()
    reader.close()
    del vae
    release(device)


def _decode(
    vae: Vae, reader: Reader, entry: str, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]:
    """The target and the conditions (H, W, 3), the masks (H, W) and the changed cells (h, w) of an entry, uint8."""
    parts = reader.parts(entry)
    target = "target.sample" if "target.sample" in parts else "target.mean"
    masks = sorted((name for name in parts if name.startswith("mask.")), key=lambda name: int(name[5:]))[:MOST_VIEWS]
    names = [target, *(name for name in (f"condition.{mask[5:]}" for mask in masks) if name in parts)]
    latents = torch.stack([reader.read(entry, name) for name in names])
    pictures = [vae.decode(latents[at : at + batch_size]) for at in range(0, len(names), batch_size)]
    decoded = [_plain(picture) for batch in pictures for picture in batch]
    value = float(reader.read(entry, "mask_value")) if "mask_value" in parts else 1.0
    unpacked = [np.unpackbits(reader.read(entry, mask).numpy(), axis=-1) for mask in masks]
    levels = [(mask * round(255 * value)).astype(np.uint8) for mask in unpacked]
    return decoded, levels, reader.read(entry, "changed").numpy() if "changed" in parts else None


def _plain(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((picture.cpu() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _shown(pictures: list[np.ndarray], masks: list[np.ndarray], changed: np.ndarray | None) -> Shown:
    target, *conditions = [_photograph(picture) for picture in pictures]
    views = [View(conditions[min(number, len(conditions) - 1)], _drawing(mask)) for number, mask in enumerate(masks)]
    return Shown(target, tuple(views), None if changed is None else _drawing(changed))


def _photograph(pixels: np.ndarray) -> str:
    return _uri(_small(Image.fromarray(pixels), Image.Resampling.BOX), "WEBP", quality=QUALITY)


def _drawing(levels: np.ndarray) -> str:
    return _uri(_small(Image.fromarray(levels), Image.Resampling.BOX), "PNG", optimize=True)


def _small(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    scale = SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
