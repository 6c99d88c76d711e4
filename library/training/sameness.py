"""What makes two runs the same (configuration, seed, data and base), and when one is done. Needs no torch, so that
`--dry_run` can tell as well."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from library.config import resolved
from library.config.run import Run
from library.data.listing import Listing
from library.models.base import Base
from library.training.run_folder import Record

if TYPE_CHECKING:
    from library.data.cached import CachedDataset

DRAWN, SPLIT_UNSEEDED = "drawn when the run began", "the split of a run without a seed"
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 64


def identity_of(run: Run, dataset: CachedDataset | Listing, base: Base) -> dict[str, object]:
    """All that may not change while a run is continued, by name."""
    return {**resolved.identity(run), "data": data_identity(dataset), "base": base_identity(base)}


def data_identity(dataset: CachedDataset | Listing) -> str:
    """The items that are trained on, with all their entries. Prompts of previews, which the cache holds for other runs
    too, are none of it."""
    digest = hashlib.sha256()
    texts = dataset.manifest.texts
    for item in dataset.items:
        captions = [texts[number].fingerprint for number in item.texts]
        digest.update(repr((item.key, item.subset, captions, item.sizes)).encode())
    digest.update(texts[0].fingerprint.encode())
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


def with_seed(run: Run, seed: int) -> Run:
    """The run as if `seed` had been said, for its identity and its resolved configuration.

    The split of a data set was made without it, by 0, in the caching command's sight too: that is written down as well.
    """
    if run.training.seed is not None:
        return run
    datasets, origins = [], dict(run.origins)
    for index, dataset in enumerate(run.datasets):
        if dataset.validation_split and dataset.validation_seed is None:
            dataset = dataset.model_copy(update={"validation_seed": 0})
            origins[f"datasets.{index}.validation_seed"] = SPLIT_UNSEEDED
        datasets.append(dataset)
    run = run.model_copy(update={"datasets": tuple(datasets), "origins": origins})
    return run.with_values("training", DRAWN, seed=seed)


def nothing_left(run: Run, folder: Path, record: Record | None) -> str:
    """Why there is nothing to do in this folder any more; '' if there is."""
    if record is None or record.finished_steps is None:
        return ""
    patience = run.validation.early_stop_patience
    if record.stopped_early is not None and patience is not None and patience <= record.stopped_early:
        return (
            f"{folder} holds this run, which stopped early after {record.finished_steps} steps: nothing is left to do. "
            f"Raise early_stop_patience above {record.stopped_early} to go on, or use --fresh to start a new run in a "
            "numbered folder"
        )
    wanted = run.training.max_train_steps
    longer = run.training.max_train_epochs > (record.finished_epochs or 0) if wanted is None else False
    if longer or (wanted or 0) > record.finished_steps:
        return ""
    return (
        f"{folder} holds this run, finished after {record.finished_steps} steps: nothing is left to do. Raise "
        "max_train_steps or max_train_epochs to go on, or use --fresh to start a new run in a numbered folder"
    )
