"""FLUX Fill's input and loss, as FluxFillPipeline packs them: 64 noisy, 64 condition and 256 mask channels a token."""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel

from tools.nano.bank import Batch

CONFIG = {
    "patch_size": 1,
    "in_channels": 384,
    "out_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}


def new_transformer(seed: int) -> FluxTransformer2DModel:
    """An untrained transformer whose blocks begin as the identity and whose output begins at zero."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (name.endswith("linear") and "norm" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def pack(grid: torch.Tensor) -> torch.Tensor:
    """(batch, channels, h, w) to (batch, h/2 * w/2, 4 * channels), channel first inside a token."""
    b, c, h, w = grid.shape
    return grid.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The inverse of pack for a latent grid of h x w."""
    b, _, channels = tokens.shape
    grid = tokens.view(b, h // 2, w // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(b, channels // 4, h, w)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) to (batch, tokens, 256): the 8x8 pixels of each latent cell become channels."""
    b, height, width = mask.shape
    cells = mask.view(b, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3)
    return pack(cells.reshape(b, 64, height // 8, width // 8))


def position_ids(h: int, w: int) -> torch.Tensor:
    """(tokens, 3): 0, row and column of every image token of a latent grid of h x w."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def predict(
    model: Callable[..., tuple[torch.Tensor]],
    noisy: torch.Tensor,
    time: torch.Tensor,
    batch: Batch,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """The velocity (noise - latents) of packed tokens; `noisy` is a latent grid, `time` in (0, 1]."""
    h, w = noisy.shape[2:]
    return model(
        hidden_states=torch.cat([pack(noisy), pack(batch.condition), pack_mask(batch.mask)], dim=-1),
        timestep=time,
        guidance=guidance,
        pooled_projections=batch.pooled,
        encoder_hidden_states=batch.text,
        txt_ids=torch.zeros(batch.text.shape[1], 3),
        img_ids=position_ids(h, w),
        return_dict=False,
    )[0]


def draw_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform, half logit-normal around the middle of FLUX's shifted schedule."""
    uniform = torch.rand(count, generator=generator)
    normal = torch.sigmoid(0.4 + torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform, normal).clamp(1e-3, 1)


def draw_guidance(count: int, generator: torch.Generator) -> torch.Tensor:
    """Any guidance from 1 to 50: this base is no distilled model, so that the number must not matter."""
    return 1 + 49 * torch.rand(count, generator=generator)


def flow_loss(model: Callable[..., tuple[torch.Tensor]], batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity over the whole picture (FLUX trains so, masked or not)."""
    count = len(batch.latents)
    time, guidance = draw_times(count, generator), draw_guidance(count, generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    mixed = time.view(-1, 1, 1, 1)
    noisy = (1 - mixed) * batch.latents + mixed * noise
    return torch.nn.functional.mse_loss(predict(model, noisy, time, batch, guidance), pack(noise - batch.latents))
