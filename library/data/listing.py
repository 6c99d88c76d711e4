"""What a cache holds of a configuration's data: found, checked and listed without torch.

The trainer checks the cache here before it loads anything; `--dry_run` counts batches here.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from library.conditioning import MODES
from library.config.run import Run
from library.config.tables import DatasetTable
from library.data.footprint import Footprint, changes
from library.data.identities import identity_of
from library.data.manifest import (
    Manifest,
    ManifestItem,
    differences,
    manifest_path,
    manifests,
    portable_hash,
    read_manifest,
)
from library.data.order import Member
from library.data.plan import all_subsets
from library.data.prompts import plain, preview_requests
from library.data.scope import scope_of
from library.data.shares import Share, held_out, shares, trained_counts
from library.data.store import Store, entry_facts
from library.errors import CacheError
from library.models.base import Base

MOST_SAID = 20


class Listing:
    """The items of a cache that is up to date, in training and held out."""

    def __init__(self, store: Store, manifest: Manifest, datasets: tuple[DatasetTable, ...], seed: int):
        self.store = store
        self.manifest = manifest
        self.datasets = datasets
        held = held_out(manifest.items, datasets, seed)
        self._counts = trained_counts(manifest.items, datasets, seed)
        self.items = tuple(item for item in manifest.items if item.key not in held)
        self.held_out_items = tuple(item for item in manifest.items if item.key in held)
        if not self.items:
            raise CacheError("every item is held out for validation: nothing is left to train on")

    @cached_property
    def shares(self) -> list[Share]:
        """Each subset's items, repeats and share of an epoch."""
        return shares(self.manifest.subsets, all_subsets(self.datasets), self._counts)

    @cached_property
    def num_pairs(self) -> int:
        """Items in training with a target of their own. A table says it for all its items: the first one tells."""
        found = 0
        for number, subset in enumerate(all_subsets(self.datasets)):
            own = [item for item in self.items if item.subset == number]
            if own and ("target" in MODES[subset.mode].needs or self._has_target(own[0])):
                found += len(own)
        return found

    def _has_target(self, item: ManifestItem) -> bool:
        entry = item.sizes[0][0]
        facts = entry_facts(self.store.folder / self.store.where[entry])
        return facts[entry]["made_of"].get("target") is not None

    @cached_property
    def members(self) -> list[Member]:
        """The items in training as the order of batches sees them."""
        where = [number for number, dataset in enumerate(self.datasets) for _ in dataset.subsets]
        members = []
        for item in self.items:
            dataset = where[item.subset]
            sizes = tuple(self.store.bucket(choices[0]) for choices in item.sizes)
            batch_size = self.datasets[dataset].train_batch_size
            repeats = self.shares[item.subset].repeats
            members.append(Member(item.key, repeats, (dataset, sizes), batch_size, len(sizes)))
        return members


def listed(run: Run) -> Listing:
    """The cached items of a configuration. Raises CacheError, naming the command to run, if it is not up to date."""
    base = Base.open(run.model)
    scope = scope_of(run, base)
    folder = scope.folder
    manifest, unknown = _with_previews_of(_manifest(folder, scope.config, run), run)
    store = Store(folder)
    stale = [*_other_encoders(manifest, base, folder), *changes(Footprint(manifest.files, manifest.folders)), *unknown]
    missing = manifest.fingerprints - set(store.where)
    if missing:
        stale.append(f"{len(missing)} of its {len(manifest.fingerprints)} entries are missing")
    stale += [f"{name} is damaged" for name in store.broken]
    if stale:
        raise CacheError(
            f"the cache in {folder} is not up to date:\n  " + "\n  ".join(_shortened(stale)) + f"\n{_advice(run)}"
        )
    return Listing(store, manifest, run.datasets, run.training.seed or 0)


def _shortened(lines: list[str]) -> list[str]:
    return lines[:MOST_SAID] + ([f"... and {len(lines) - MOST_SAID} more"] if len(lines) > MOST_SAID else [])


def _advice(run: Run) -> str:
    return f"Run: {shlex.join(['python', 'influx_cache.py', *run.to_cache])}"


def _manifest(folder: Path, config: dict, run: Run) -> Manifest:
    exact = manifest_path(folder, config)
    if exact.is_file():
        return read_manifest(exact)
    others = list(manifests(folder))
    sources_here = any(
        Path(path).exists()
        for subset in all_subsets(run.datasets)
        for path in (subset.image_dir, subset.metadata_file, subset.dataset_name)
        if path is not None
    )
    if not sources_here:
        for path, content in others:
            if content.get("portable") == portable_hash(config):
                return read_manifest(path)
    if not others:
        raise CacheError(f"there is no cache of this data set in {folder}.\n{_advice(run)}")
    changed = min((differences(content["config"], json.loads(json.dumps(config))) for _, content in others), key=len)
    raise CacheError(
        f"the cache in {folder} is of another configuration:\n  " + "\n  ".join(_shortened(changed)) + f"\n{_advice(run)}"
    )


def _other_encoders(manifest: Manifest, base: Base, folder: Path) -> list[str]:
    """Encoders that are here and are not those the cache was made with. Absent ones are no error: the trainer needs
    neither."""
    found = []
    for part, cached, words in (
        ("vae", manifest.vae, "another VAE"),
        ("text_encoders", manifest.text_encoders, "other text encoders"),
    ):
        current = identity_of(base, part, folder)
        if current is not None and current != cached:
            found.append(f"it was made with {words} than {base.name} has")
    return found


def _with_previews_of(manifest: Manifest, run: Run) -> tuple[Manifest, list[str]]:
    """The manifest with the previews that this run asks for alone, in its order; and what is wrong if it lacks some.

    Runs that share a data set share its manifest, and each finds its own prompts there. A prompt file that is not on
    this machine is no error: all previews are made then.
    """
    prompts = run.sampling.sample_prompts
    if prompts is not None and not prompts.exists() and manifest.previews:
        return manifest, []
    known = {json.dumps(preview.request, sort_keys=True): preview for preview in manifest.previews}
    asked = [json.dumps(plain(request), sort_keys=True) for request in preview_requests(run.sampling)]
    lacking = sum(request not in known for request in asked)
    found = tuple(known[request] for request in asked if request in known)
    wrong = [f"it lacks {lacking} of the {len(asked)} sample prompts of this configuration"] if lacking else []
    return replace(manifest, previews=found), wrong
