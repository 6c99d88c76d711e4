"""The resolved item list of one data set configuration: what the caching command promises and the trainer reads.

Kept in the cache as manifests/<hash>.json. The hash covers the keys that change what is cached; how often an item
comes, how captions are dropped or batches made is read from the configuration of the day.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from library.config.tables import CacheTable, DatasetTable
from library.data.bulk import collection_paused, read_json
from library.data.footprint import SourceFile, SourceFolder, source_file, without
from library.data.plan import Plan
from library.data.prompts import plain
from library.data.recipe import TextEncoding, digest
from library.data.store import MANIFESTS
from library.errors import CacheError
from library.files import atomic_write

FORMAT_VERSION = 1
AT_TRAINING_TIME = frozenset(
    {
        "num_repeats", "subset_weight", "caption_dropout_rate", "caption_dropout_every_n_epochs", "is_reg",
        "is_validation", "train_batch_size", "validation_split", "validation_seed", "subsets",
    }
)  # fmt: skip
SEEDED = ("random_crop", "generate_mask", "mask_jitter", "shuffle_caption", "caption_tag_dropout_rate")
PATHS = ("image_dir", "target_dir", "mask_dir", "caption_dir", "metadata_file")


class Text(NamedTuple):
    """A caption: its entry, itself, and the words T5 does not see of it."""

    fingerprint: str
    caption: str
    lost: str = ""


class ManifestItem(NamedTuple):
    """An item by its parts' fingerprints. texts: numbers of its captions; sizes: entries for each resolution."""

    key: str
    subset: int
    texts: Sequence[int]
    sizes: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ManifestPreview:
    """A preview's request, its mode and its entries; negative: entry of the negative prompt."""

    request: dict
    mode: str
    entry: str
    text: str
    negative: str | None


@dataclass(frozen=True)
class Manifest:
    """What the trainer needs to know of a data set. texts[0] is the empty caption."""

    config: dict
    vae: str
    text_encoders: str
    subsets: tuple[str, ...]
    texts: tuple[Text, ...]
    items: tuple[ManifestItem, ...]
    files: dict[str, SourceFile]
    previews: tuple[ManifestPreview, ...] = ()
    folders: tuple[SourceFolder, ...] = ()

    @property
    def fingerprints(self) -> set[str]:
        """Every entry it counts on."""
        images = {fingerprint for item in self.items for choices in item.sizes for fingerprint in choices}
        previews = {preview.entry for preview in self.previews}
        return images | previews | {text.fingerprint for text in self.texts}


def cache_config(datasets: tuple[DatasetTable, ...], cache: CacheTable, token_length: int, seed: int) -> dict:
    """Everything in the configuration that decides what is cached."""
    listed = [_dataset_config(dataset) for dataset in datasets]
    seeded = any(subset[name] for dataset in listed for subset in dataset["subsets"] for name in SEEDED)
    return {
        "datasets": listed,
        "cache_latents_as": cache.cache_latents_as,
        "vae_dtype": cache.vae_dtype,
        "vae_tiling": cache.vae_tiling,
        "t5xxl_max_token_length": token_length,
        "t5xxl_precision": cache.t5xxl_precision,
        "seed": seed if seeded else None,
    }


def _dataset_config(dataset: DatasetTable) -> dict:
    plain = json.loads(dataset.model_dump_json(exclude={"subsets", *AT_TRAINING_TIME}))
    subsets = []
    for subset in dataset.subsets:
        content = json.loads(subset.model_dump_json(exclude=set(AT_TRAINING_TIME)))
        content["full_mask_rate"] = subset.full_mask_rate > 0
        subsets.append(content)
    return {**plain, "subsets": subsets}


def config_hash(config: dict) -> str:
    """The name of a configuration's manifest."""
    return digest(config)


def portable_hash(config: dict) -> str:
    """The same, but for where the folders lie: only their names count."""
    copy = json.loads(json.dumps(config))
    for dataset in copy["datasets"]:
        for subset in dataset["subsets"]:
            for name in PATHS:
                if subset[name] is not None:
                    subset[name] = Path(subset[name].replace("\\", "/")).name
    return digest(copy)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """What differs between two configurations, as "key: old -> new"."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            for number, (first, second) in enumerate(zip(before, after, strict=True), start=1):
                if isinstance(first, dict) and isinstance(second, dict):
                    found += differences(first, second, f"{prefix}{key}[{number}].")
                elif first != second:
                    found.append(f"{prefix}{key}: {before} -> {after}")
                    break
        elif before != after:
            found.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return found


def make_manifest(plan: Plan, config: dict, vae: str, encoding: TextEncoding, lost: dict[str, str]) -> Manifest:
    """The manifest of a plan whose entries are all in the cache. lost: words cut off, by caption."""
    captions = plan.captions
    numbers = {caption: number for number, caption in enumerate(captions)}
    texts = tuple(Text(encoding.fingerprint(caption), caption, lost.get(caption, "")) for caption in captions)
    items = tuple(
        ManifestItem(
            item.key,
            item.subset,
            tuple(numbers[caption] for caption in item.captions),
            tuple(tuple(recipe.fingerprint for recipe in choices) for choices in item.sizes),
        )
        for item in plan.items
    )
    previews = tuple(
        ManifestPreview(
            plain(preview.request),
            preview.mode,
            preview.fingerprint,
            encoding.fingerprint(preview.request.prompt),
            None if preview.request.negative is None else encoding.fingerprint(preview.request.negative),
        )
        for preview in plan.previews
    )
    files = _files(plan)
    folders = without(plan.footprint.folders, files)
    return Manifest(config, vae, encoding.encoders, plan.subset_names, texts, items, files, previews, folders)


def _files(plan: Plan) -> dict[str, SourceFile]:
    """Every source file, as it was when the plan was made: what changes while it is encoded has changed."""
    found = dict(plan.footprint.files)
    pictures = [picture for preview in plan.previews for picture in preview.pictures]
    for item in plan.items:
        pair = item.first.pair
        pictures += [picture for picture in (pair.source, pair.target, pair.mask) if picture is not None]
        if pair.caption_file is not None and pair.caption_seen is not None:
            found[str(pair.caption_file)] = pair.caption_seen
    for picture in pictures:
        if picture.known.stat is not None:
            found[picture.blob.key] = source_file(picture.known.stat, picture.known.sha256)
    return found


def manifest_path(folder: Path, config: dict) -> Path:
    """Where a configuration's manifest lies."""
    return Path(folder) / MANIFESTS / f"{config_hash(config)}.json"


def config_path(manifest: Path) -> Path:
    """The configuration that a manifest was last made with, resolved, for people."""
    return manifest.parent.parent / "configurations" / f"{manifest.stem}.toml"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write a manifest under the name of its configuration."""
    content = {
        "format": "influx-manifest",
        "version": FORMAT_VERSION,
        "portable": portable_hash(manifest.config),
        "config": manifest.config,
        "vae": manifest.vae,
        "text_encoders": manifest.text_encoders,
        "subsets": manifest.subsets,
        "texts": manifest.texts,
        "items": manifest.items,
        "previews": [astuple(preview) for preview in manifest.previews],
        "files": manifest.files,
        "folders": manifest.folders,
    }
    path = manifest_path(folder, manifest.config)
    atomic_write(path, json.dumps(content, separators=(",", ":")))
    return path


def read_manifest(path: Path) -> Manifest:
    """Raises CacheError if the file is missing or not whole."""
    try:
        content = read_json(path)
        if content["version"] != FORMAT_VERSION:
            raise CacheError(f"{path} is of another version of InFlux: run influx_cache.py again")
        with collection_paused():
            items = tuple(map(ManifestItem._make, content["items"]))
        files = content["files"]
        texts = tuple(map(Text._make, content["texts"]))
        previews = tuple(ManifestPreview(*preview) for preview in content["previews"])
        subsets = tuple(content["subsets"])
        vae, encoders = content["vae"], content["text_encoders"]
        folders = tuple(map(SourceFolder._make, content.get("folders", ())))  # caches made before it was written
        return Manifest(content["config"], vae, encoders, subsets, texts, items, files, previews, folders)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} cannot be read ({error}): run influx_cache.py again") from error


def manifests(folder: Path) -> Iterable[tuple[Path, dict]]:
    """Path and content of every readable manifest in a cache, newest first."""
    found = sorted((Path(folder) / MANIFESTS).glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)
    for path in found:
        try:
            content = read_json(path)
            if content["version"] == FORMAT_VERSION and isinstance(content["config"], dict):
                yield path, content
        except (OSError, ValueError, KeyError, TypeError):
            continue
