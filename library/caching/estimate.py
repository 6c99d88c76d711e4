"""What is missing, how large it will be, and whether it fits the disk: said before anything is encoded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from library.data.plan import Plan
from library.data.previews import PlannedPreview
from library.data.recipe import ImageEncoding, Recipe, TextEncoding
from library.data.store import Store
from library.errors import DiskError

LATENT_CHANNELS = 16
CELL = 8
STORED_BYTES = 2  # bf16
CLIP_LENGTH = 77
HEADER_BYTES = 2000  # of an entry, in its shard's header
RESERVE = 64 << 20  # left free on the disk


@dataclass(frozen=True)
class Needs:
    """What has to be encoded, in the order in which it will be."""

    captions: list[str]
    recipes: list[Recipe]
    previews: list[PlannedPreview]
    num_fresh: int
    num_bytes: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be encoded."""
        return not (self.captions or self.recipes or self.previews)

    @property
    def canvases(self) -> list[tuple[int, int]]:
        """Width and height of every picture that the VAE encodes, conditions and previews among them."""
        return [recipe.size for recipe in self.recipes for _ in range(num_pictures(recipe))] + [
            preview.size for preview in self.previews
        ]

    def summary(self, free: int) -> str:
        """One line for people."""
        if self.is_empty:
            return f"everything is cached: {self.num_fresh} entries are fresh"
        images = len(self.recipes) + len(self.previews)
        return (
            f"to encode: {len(self.captions)} captions, {images} images; {self.num_fresh} are fresh; "
            f"about {megabytes(self.num_bytes)} of {megabytes(free)} free"
        )


def megabytes(count: int) -> str:
    """A size for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def needs_of(plan: Plan, images: ImageEncoding, texts: TextEncoding, store: Store, widths: tuple[int, int]) -> Needs:
    """Compare a plan with the cache. widths: of T5's and CLIP's embeddings."""
    captions = [caption for caption in plan.captions if texts.fingerprint(caption) not in store]
    recipes = [recipe for fingerprint, recipe in plan.recipes.items() if fingerprint not in store]
    if not any(recipe.pair.source.blob.streams for recipe in recipes):
        recipes.sort(key=lambda recipe: recipe.size)  # one shard at a time is open, and a kill loses no more than it
    num_bytes = sum(image_bytes(recipe) for recipe in recipes) + len(captions) * text_bytes(texts, widths)
    distinct = {preview.fingerprint: preview for preview in plan.previews}
    previews = sorted((one for name, one in distinct.items() if name not in store), key=lambda one: one.size)
    missing = len(recipes) + len(captions) + len(previews)
    fresh = len(plan.recipes) + len(plan.captions) + len(distinct) - missing
    return Needs(captions, recipes, previews, fresh, num_bytes)


def num_pictures(recipe: Recipe) -> int:
    """What the VAE encodes for an entry: the target, and a condition for all variants or for each mask."""
    return 1 + (1 if recipe.look.mode == "edit" else recipe.num_masks)


def image_bytes(recipe: Recipe) -> int:
    """Size of an image entry on the disk."""
    width, height = recipe.size
    latent = LATENT_CHANNELS * (width // CELL) * (height // CELL) * STORED_BYTES
    targets = 2 if recipe.encoding.latents_as == "distribution" else 1
    conditions = num_pictures(recipe) - 1
    masks = recipe.num_masks * width * height // 8
    return (targets + conditions) * latent + masks + (width // CELL) * (height // CELL) + HEADER_BYTES


def text_bytes(texts: TextEncoding, widths: tuple[int, int]) -> int:
    """Size of a text entry on the disk."""
    value = 4 if texts.precision == "fp32" else STORED_BYTES
    return (texts.length * widths[0] + widths[1]) * value + 4 * (texts.length + CLIP_LENGTH) + HEADER_BYTES


def refuse_full_disk(needs: Needs, folder: Path) -> None:
    """Raise DiskError if what has to be encoded does not fit."""
    free = shutil.disk_usage(folder).free
    if needs.num_bytes + RESERVE > free and not needs.is_empty:
        raise DiskError(
            f"the cache needs about {megabytes(needs.num_bytes)}, but {folder} has {megabytes(free)} free: "
            'free some space, set dataset_cache_dir to another disk, or cache_latents_as = "mean"'
        )
