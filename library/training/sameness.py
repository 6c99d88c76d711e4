"""What makes two runs the same: configuration, data and base. Needs no torch, so that `--dry_run` can tell as well."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from library.config import resolved
from library.config.run import Run
from library.data.listing import Listing
from library.models.base import Base

if TYPE_CHECKING:
    from library.data.cached import CachedDataset

_SAMPLE_BYTES, _SAMPLES = 1 << 16, 64


def identity_of(run: Run, dataset: CachedDataset | Listing, base: Base) -> dict[str, object]:
    """All that may not change while a run is continued, by name."""
    return {**resolved.identity(run), "data": data_identity(dataset), "base": base_identity(base)}


def data_identity(dataset: CachedDataset | Listing) -> str:
    """The items that are trained on, with all their entries. Prompts of previews, which the cache holds for other runs
    too, are none of it."""
    digest = hashlib.sha256()
    for item in dataset.items:
        digest.update(repr((item.key, item.subset, item.texts, item.sizes)).encode())
    captions = {0, *(number for item in dataset.manifest.items for number in item.texts)}
    for number in sorted(captions):
        digest.update(dataset.manifest.texts[number].fingerprint.encode())
    return digest.hexdigest()


def base_identity(base: Base) -> str:
    """The transformer's files by size and by samples of their bytes: hashing all 24 GB would take a minute."""
    digest = hashlib.sha256()
    for path in base.files("transformer"):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
