"""Previews during training, and what inference shares with them."""

from __future__ import annotations

from typing import ClassVar

from library.config.table import FilePath, FilePaths, Strings, Table, key


class SamplingTable(Table):
    """Images made while training. Their prompts, conditions and masks are cached with the data."""

    section: ClassVar[str] = "sampling"
    reads: ClassVar[str] = "cache train"

    sample_prompts: FilePath | None = key(None, path="path")
    """Prompts for previews: .txt (one per line, with --w --h --d --s --g --l --n --ci --mask), .toml or .json."""
    sample_every_n_steps: int | None = key(
        50, aliases=("validation_steps",), ge=1, reads="train", kohya="none", rerun=True
    )
    """Make previews every N steps, if there are prompts for them."""
    sample_every_n_epochs: int | None = key(None, ge=1, reads="train", rerun=True)
    """Make previews every N epochs; wins over sample_every_n_steps."""
    sample_at_first: bool = key(False, reads="train", rerun=True)
    """Make previews before the first step."""
    sample_at_end: bool = key(True, reads="train", rerun=True)
    """Make previews after the last step."""
    sample_guidance_scale: float | None = key(None, ge=0, reads="train infer", rerun=True)
    """Guidance of previews, inference and workflows. 30 unless the base's influx.json says otherwise; inference
    takes the LoRA's first."""
    sample_steps: int | None = key(None, ge=1, reads="train infer", rerun=True)
    """Denoising steps. 50 unless the base's influx.json says otherwise."""
    sample_seed: int | None = key(None, ge=0, reads="train", rerun=True)
    """Seed of the previews' noise; `seed` if not set."""
    validation_prompt: Strings = key(())
    """Prompts for previews, separated by `;`."""
    validation_image: FilePaths = key((), path="path")
    """Condition images of the previews, one for each prompt or one for all."""
    validation_mask: FilePaths = key((), path="path")
    """Masks of the previews; not used in edit mode nor with use_split_mask."""
    num_validation_images: int = key(1, ge=1)
    """Previews per prompt, with different seeds."""
    validation_width: int = key(1024, ge=16)
    """Width of the previews of validation_prompt."""
    validation_height: int = key(1024, ge=16)
    """Height of the previews of validation_prompt."""
