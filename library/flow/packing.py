"""How latents and masks become FLUX tokens: 2x2 patches of latents, 8x8 pixel blocks of masks.

Agrees with diffusers' FluxFillPipeline (``_pack_latents``, ``prepare_mask_latents``, ``_prepare_latent_image_ids``).
"""

import torch
from torch import Tensor

LATENT_SCALE = 8
PATCH = 2
PIXELS_PER_TOKEN = LATENT_SCALE * PATCH


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): each token is a 2x2 patch, channel-major, rows before columns.

    Raises ValueError if h or w is odd.
    """
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents of {height}x{width} cannot be packed: both sides must be even")
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 4C) -> (B, C, h, w); ``height`` and ``width`` are the latents'. Inverse of pack_latents."""
    batch, _, features = tokens.shape
    channels = features // (PATCH * PATCH)
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def pack_mask(mask: Tensor) -> Tensor:
    """(B, 1, H, W) mask of pixels -> (B, H/16 * W/16, 256): each 8x8 block becomes 64 channels (row-major), packed 2x2.

    Raises ValueError if H or W is no multiple of 16.
    """
    batch, _, height, width = mask.shape
    if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
        raise ValueError(f"a mask of {width}x{height} cannot be packed: both sides must be multiples of 16")
    blocks = mask.reshape(batch, height // LATENT_SCALE, LATENT_SCALE, width // LATENT_SCALE, LATENT_SCALE)
    blocks = blocks.permute(0, 2, 4, 1, 3)
    return pack_latents(blocks.reshape(batch, LATENT_SCALE**2, height // LATENT_SCALE, width // LATENT_SCALE))


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Position ids (h/2 * w/2, 3) of latents of ``height`` x ``width``: [0, row, column] of each token, float32."""
    ids = torch.zeros(height // PATCH, width // PATCH, 3, device=device)
    ids[..., 1] = torch.arange(height // PATCH, device=device)[:, None]
    ids[..., 2] = torch.arange(width // PATCH, device=device)[None, :]
    return ids.reshape(-1, 3)
