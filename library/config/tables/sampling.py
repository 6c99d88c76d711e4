"""Previews during training, and what inference shares with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from library.config.table import FilePath, FilePaths, Strings, Table, key
from library.config.tables.inference import LONGEST_SIDE

if TYPE_CHECKING:
    from library.config.run import Run

_ASKED = "sample_prompts or validation_prompt or sample_items"


class SamplingTable(Table):
    """Images made while training. Their prompts, conditions and masks are cached with the data."""

    section: ClassVar[str] = "sampling"
    reads: ClassVar[str] = "cache train"

    sample_prompts: FilePath | None = key(None, path="path", exists="cache", rerun=True)
    """Prompts for previews: .txt (one per line, with --w --h --d --s --g --l --n --ci --mask), .toml or .json."""
    sample_items: int = key(0, ge=0, reads="train", rerun=True)
    """Make previews of this many items of the data too (held-out ones first, each subset in turn): from an item's own
    source, mask and caption, with its target beside. Needs no prompts, and nothing more in the cache."""
    sample_every_n_steps: int | None = key(
        50, aliases=("validation_steps",), ge=1, reads="train", kohya="none", rerun=True, only_with=_ASKED
    )
    """Make previews every N steps, if there are prompts or items for them."""
    sample_every_n_epochs: int | None = key(None, ge=1, reads="train", rerun=True, only_with=_ASKED)
    """Make previews every N epochs; wins over sample_every_n_steps."""
    sample_at_first: bool = key(False, reads="train", rerun=True, only_with=_ASKED)
    """Make previews before the first step."""
    sample_at_end: bool = key(True, reads="train", rerun=True, only_with=_ASKED)
    """Make previews after the last step."""
    sample_guidance_scale: float | None = key(None, ge=0, reads="cache train infer", rerun=True)
    """Guidance of previews, inference and workflows. 30 unless the base's influx.json says otherwise; inference
    takes the LoRA's first."""
    sample_steps: int | None = key(None, ge=1, reads="cache train infer", rerun=True)
    """Denoising steps. 50 unless the base's influx.json says otherwise."""
    sample_seed: int | None = key(None, ge=0, reads="train", rerun=True, only_with=_ASKED)
    """Seed of the previews' noise; `seed` if not set."""
    validation_prompt: Strings = key((), rerun=True)
    """Prompts for previews, separated by `;`."""
    validation_image: FilePaths = key((), path="path", only_with="validation_prompt", exists="cache", rerun=True)
    """Condition images of the previews, one for each prompt or one for all. If not set: the data's first, and in mask
    mode none (painted from the prompt alone). A validation_mask needs its image."""
    validation_mask: FilePaths = key((), path="path", only_with="validation_prompt", exists="cache", rerun=True)
    """Masks of the previews: what is repainted in mask mode, the region that may change in edit mode. White counts, or
    black with the data's invert_mask. Does nothing in spatial mode (use_split_mask)."""
    num_validation_images: int = key(1, ge=1, only_with="validation_prompt", rerun=True)
    """Previews per prompt, with different seeds."""
    validation_width: int | None = key(
        None, ge=16, le=LONGEST_SIDE, only_with="validation_prompt", rerun=True, seed="1024"
    )
    """Width of the previews of validation_prompt (of both halves in spatial mode); the data's size if not set."""
    validation_height: int | None = key(
        None, ge=16, le=LONGEST_SIDE, only_with="validation_prompt", rerun=True, seed="1024"
    )
    """Height of the previews of validation_prompt; the data's size if not set."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """One condition image and mask for all prompts, or one for each."""
        for name in ("validation_image", "validation_mask"):
            count = len(getattr(self, name))
            if count > 1 and self.validation_prompt and len(self.validation_prompt) not in (1, count):
                yield (
                    [name, "validation_prompt"],
                    f"{name} has {count} files for {len(self.validation_prompt)} prompts; give one for all or one for "
                    "each (separated by semicolons).",
                )
