"""FluxFillPipeline as the oracle: what it feeds its transformer, and the picture it makes of given noise.

diffusers draws the condition from the VAE's posterior where InFlux takes the mean, so the oracle's posterior is made to
return its mean. Edit mode is the same pipeline with the latents of the unmasked picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import FluxFillPipeline
from PIL import Image
from torch import Tensor

from library.flow.packing import pack_latents

MASK_LENGTH = 32


@dataclass
class Oracle:
    """The pipeline's result (unpacked by nobody: packed latents, or an array) and every call of its transformer."""

    output: object
    calls: list[dict[str, Tensor]] = field(default_factory=list)


@contextmanager
def posterior_means(pipeline: FluxFillPipeline, unmasked: Tensor | None) -> Iterator[None]:
    """Inside, encoding gives the mean; with `unmasked`, the condition is this picture whatever the mask says."""
    encode, prepare = pipeline.vae.encode, pipeline.prepare_mask_latents

    def encode_to_mean(*args, **kwargs):
        encoded = encode(*args, **kwargs)
        encoded.latent_dist.sample = lambda generator=None: encoded.latent_dist.mode()
        return encoded

    def prepare_unmasked(mask, masked_image, *args, **kwargs):
        return prepare(mask, masked_image if unmasked is None else unmasked, *args, **kwargs)

    pipeline.vae.encode, pipeline.prepare_mask_latents = encode_to_mean, prepare_unmasked
    try:
        yield
    finally:
        pipeline.vae.encode, pipeline.prepare_mask_latents = encode, prepare


def run_oracle(
    pipeline: FluxFillPipeline,
    image: Image.Image,
    mask: Image.Image,
    prompt: str,
    noise: Tensor,
    *,
    edit: bool,
    guidance: float,
    steps: int,
    output_type: str = "latent",
) -> Oracle:
    """Run the pipeline on one picture from `noise` (1, 16, h, w), recording its transformer's inputs."""
    oracle = Oracle(None)
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: oracle.calls.append(dict(kwargs)), with_kwargs=True
    )
    unmasked = pipeline.image_processor.preprocess(image, height=image.height, width=image.width) if edit else None
    pipeline.set_progress_bar_config(disable=True)
    try:
        with posterior_means(pipeline, unmasked):
            oracle.output = pipeline(
                prompt=prompt, image=image, mask_image=mask, height=image.height, width=image.width,
                num_inference_steps=steps, guidance_scale=guidance, latents=pack_latents(noise),
                max_sequence_length=MASK_LENGTH, output_type=output_type,
            ).images  # fmt: skip
    finally:
        hook.remove()
    return oracle


def noisy_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without any regularity a wrong order of rows or columns could hide in."""
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def noisy_mask(width: int, height: int, seed: int = 1) -> Image.Image:
    """A mask whose every pixel is drawn: no two 8x8 blocks are alike."""
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.4
    return Image.fromarray(values.numpy().astype("uint8") * 255)
