"""What one run asks of the cache: which folder, which configuration, which encoders. Shared by caching and training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.run import Run
from library.data.identities import identity_of
from library.data.manifest import cache_config
from library.data.recipe import ImageEncoding, TextEncoding
from library.errors import ModelError
from library.models.base import Base
from library.models.encoders import VAE_TILE


@dataclass(frozen=True)
class Scope:
    """config: everything that decides what is cached, but for the encoders' contents."""

    folder: Path
    config: dict
    length: int
    seed: int


def cache_folder(run: Run) -> Path:
    """Where a run's cache lies."""
    return Path(run.cache.dataset_cache_dir or run.saving.output_dir / "dataset_cache")


def scope_of(run: Run, base: Base) -> Scope:
    """The scope of a run."""
    folder = cache_folder(run)
    length = run.cache.t5xxl_max_token_length or base.defaults.t5xxl_max_token_length
    seed = run.training.seed or 0
    return Scope(folder, cache_config(run.datasets, run.cache, length, seed), length, seed)


def encodings(run: Run, base: Base, scope: Scope) -> tuple[ImageEncoding, TextEncoding]:
    """How images and captions are encoded in this run. Raises ModelError if the encoders are not there."""
    found = {}
    for part in ("vae", "text_encoders"):
        found[part] = identity_of(base, part, scope.folder)
        if found[part] is None:
            base.files(part)
            raise ModelError(f"{base.name}: the files of its {part} cannot be read")
    cache = run.cache
    return (
        ImageEncoding(found["vae"], cache.vae_dtype, cache.vae_tiling and VAE_TILE, cache.cache_latents_as),
        TextEncoding(found["text_encoders"], scope.length, cache.t5xxl_precision),
    )
