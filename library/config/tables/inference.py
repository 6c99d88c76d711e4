"""One picture or a folder of them, edited with trained networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from library.config.table import FilePath, Floats, Integers, Size, Strings, Table, as_tuple, key

if TYPE_CHECKING:
    from library.config.run import Run

LONGEST_SIDE = 4096
"""In pixels: FLUX was trained on a quarter of it, and memory grows with the area."""
FIT = Literal["error", "crop", "pad"]
LoraFiles = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class InferenceTable(Table):
    """What influx_infer.py edits, with what, and where the result goes."""

    section: ClassVar[str] = "inference"
    reads: ClassVar[str] = "infer"

    image: FilePath | None = key(None, aliases=("input_image",), path="path", exists="infer")
    """The image to edit, or a folder of images. Required."""
    mask: FilePath | None = key(None, aliases=("mask_image",), path="path", exists="infer")
    """The mask (white is repainted), or a folder of masks named as the images."""
    prompt: Strings = key(())
    """What to do: one prompt for all images, or one for each, separated by `;`."""
    prompt_dir: FilePath | None = key(None, path="path", exists="infer")
    """A folder of text files named as the images, instead of prompt."""
    lora: LoraFiles = key((), aliases=("lora_path", "lora_weights"), path="model")
    """Network files. The run's own result if not set; `none` for the base alone."""
    lora_strength: Floats = key((), aliases=("lora_multiplier", "lora_weight"))
    """Strength of each network; 1 if not set."""
    inference_mode: Literal["edit", "mask", "spatial"] | None = key(None, short="mode")
    """Mode; the one the network was trained in if not set. On the command line of influx_infer.py simply --mode."""
    inference_mask_value: float | None = key(None, ge=0, le=1, short="edit_mask_value")
    """Mask value of edit mode; the network's own if not set."""
    output: FilePath | None = key(None, aliases=("output_path",), path="path")
    """File or folder of the result; `edited` in output_dir if not set. Nothing is overwritten."""
    inference_resolution: int | Size | None = key(None, short="resolution")
    """Area the image is scaled to while it is edited: a side length, or [width, height]. The one the network was
    trained at if not set."""
    width: int | None = key(None, ge=16, le=LONGEST_SIDE)
    """Width of the result, instead of a resolution; from height and the image's aspect if only that is set."""
    height: int | None = key(None, ge=16, le=LONGEST_SIDE)
    """Height of the result, instead of a resolution."""
    fit: FIT = key("error")
    """What to do with an image whose aspect is not that of width x height: stop, crop, or pad. Never stretched."""
    seeds: Integers = key(())
    """One result for each seed; `seed` if not set."""
    num_images: int = key(1, ge=1)
    """Results per image, with seeds counted up from the first."""
    result_size: Literal["image", "edited"] = key("image")
    """Size of the result: the image's own, or the one it was edited at."""
    keep_unmasked: bool = key(True)
    """With a mask: paste the unmasked pixels of the image back over the result, untouched by the VAE."""
    inference_batch_size: int = key(1, ge=1)
    """Results made at once. Does not change them."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Strengths belong to networks, and there is one way to give the prompts."""
        if self.lora and len(self.lora_strength) > len(self.lora):
            yield (
                ["lora_strength"],
                f"lora_strength: {len(self.lora_strength)} strengths for {len(self.lora)} networks.",
            )
        area = self.inference_resolution
        for side in area if isinstance(area, tuple) else (area,):
            if side is not None and not 16 <= side <= LONGEST_SIDE:
                yield ["inference_resolution"], f"resolution = {side}: from 16 to {LONGEST_SIDE} pixels."
