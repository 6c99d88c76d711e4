"""Packing agrees with diffusers' FluxFillPipeline, bit for bit, and undoes itself."""

import pytest
import torch
from diffusers import FluxFillPipeline

from library.conditioning.item import Condition, Item
from library.flow.packing import image_ids, pack_latents, pack_mask, unpack_latents

SIZES = [(64, 64), (64, 128), (96, 32)]


@pytest.mark.parametrize("height, width", SIZES)
def test_latents_and_ids_equal_diffusers(height: int, width: int) -> None:
    h, w = height // 8, width // 8
    latents = torch.randn(2, 16, h, w)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxFillPipeline._pack_latents(latents, 2, 16, h, w))
    assert torch.equal(unpack_latents(packed, h, w), latents)
    assert torch.equal(unpack_latents(packed, h, w), FluxFillPipeline._unpack_latents(packed, height, width, 8))
    expected = FluxFillPipeline._prepare_latent_image_ids(2, h // 2, w // 2, "cpu", torch.float32)
    assert torch.equal(image_ids(h, w), expected)


class PackingOnly:
    """What FluxFillPipeline.prepare_mask_latents needs of its pipeline when the image is already encoded."""

    vae_scale_factor = 8
    _pack_latents = staticmethod(FluxFillPipeline._pack_latents)

    class vae:
        class config:
            shift_factor = 0.0
            scaling_factor = 1.0


@pytest.mark.parametrize("height, width", SIZES)
def test_condition_channels_equal_diffusers(height: int, width: int) -> None:
    latents = torch.randn(2, 16, height // 8, width // 8)
    mask = (torch.rand(2, 1, height, width) > 0.5).float()
    # The pipeline takes already encoded images by their channel count, and packs them and the mask itself.
    packed_mask, packed_latents = FluxFillPipeline.prepare_mask_latents(
        PackingOnly(), mask, latents, 2, 16, 1, height, width, torch.float32, "cpu", None
    )
    channels = Condition(latents, mask).channels()
    assert channels.shape == (2, height * width // 256, 320)
    assert torch.equal(channels, torch.cat([packed_latents, packed_mask], dim=-1))


def test_sizes_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        pack_latents(torch.zeros(1, 16, 3, 4))
    with pytest.raises(ValueError, match="multiples of 16"):
        pack_mask(torch.zeros(1, 1, 24, 32))


def test_only_blanked_items_lose_their_masked_pixels() -> None:
    pixels, mask = torch.rand(3, 16, 32) - 0.5, torch.zeros(1, 16, 32)
    mask[..., 16:] = 1
    blanked = Item(None, pixels, mask, blanked=True).condition_pixels()
    assert torch.equal(blanked[..., :16], pixels[..., :16]) and not blanked[..., 16:].any()
    assert torch.equal(Item(None, pixels, mask, blanked=False).condition_pixels(), pixels)
