"""FLUX's VAE: pixels in [-1, 1] to latents in model space, (z - shift) * scale, and back."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from library.errors import ModelError
from library.memory.device import release
from library.models.encoders import VAE_TILE
from library.models.readers import Reader

log = logging.getLogger(__name__)

Parts = Literal["both", "encoder", "decoder"]


class Vae:
    """diffusers' `AutoencoderKL` over tensors of any layout. Computes in fp32 unless asked otherwise.

    parts: load only what is needed; a trainer that decodes previews never holds the encoder.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.scaling: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0

    @classmethod
    def load(
        cls,
        reader: Reader,
        config: dict,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: Parts = "both",
        tiling: bool = False,
    ) -> Vae:
        """Build the VAE from `config` and fill it from `reader` (diffusers' names). Every tensor is accounted for."""
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
        if parts != "both":
            dropped = "decoder" if parts == "encoder" else "encoder"
            setattr(model, dropped, None)
            setattr(model, "post_quant_conv" if parts == "encoder" else "quant_conv", None)
        load_strictly(model, reader, device, dtype, ignore=_other_half(parts))
        vae = cls(model.eval().requires_grad_(False), torch.device(device), dtype)
        if tiling:
            vae.use_tiles()
        return vae

    def use_tiles(self, side: int = VAE_TILE) -> None:
        """From now on compute pictures larger than `side` pixels in overlapping tiles of that size.

        The side in the VAE's own configuration (1024 for FLUX.1, 32 for single files) would never act, or spoil them.
        """
        self.model.enable_tiling()
        self.model.tile_sample_min_size = side
        self.model.tile_latent_min_size = side // 2 ** (len(self.model.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and deviation of the posterior, (B, 16, H/8, W/8) float32, model space."""
        posterior = self.model.encode(pixels.to(self.device, self.dtype)).latent_dist
        return (posterior.mean.float() - self.shift) * self.scaling, posterior.std.float() * self.scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) in model space -> (B, 3, 8h, 8w) float32, clamped to [-1, 1].

        What the device cannot decode at once is decoded in tiles, and so is everything after it.
        """
        raw = (latents.to(self.device, torch.float32) / self.scaling + self.shift).to(self.dtype)
        try:
            return self.model.decode(raw).sample.float().clamp(-1, 1)
        except torch.OutOfMemoryError:
            if self.model.use_tiling:
                raise
        log.warning("the VAE cannot decode this size at once on this device: decoding in tiles (vae_tiling = true)")
        release(self.device)
        self.use_tiles()
        return self.model.decode(raw).sample.float().clamp(-1, 1)


def _other_half(parts: Parts) -> tuple[str, ...]:
    if parts == "both":
        return ()
    return ("decoder.", "post_quant_conv.") if parts == "encoder" else ("encoder.", "quant_conv.")


def load_strictly(
    model: torch.nn.Module,
    reader: Reader,
    device: torch.device | str,
    dtype: torch.dtype,
    ignore: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
) -> None:
    """Fill a model made on the meta device; a missing, unknown or misshapen tensor is a ModelError.

    Tensors whose names start with one of `ignore` are passed over; with one of `leave`, checked but not loaded.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    offered = {name: shape for name, shape in reader.shapes.items() if not name.startswith(ignore)} if ignore else None
    offered = reader.shapes if offered is None else offered
    problems = [f"missing {name}" for name in wanted if name not in offered]
    problems += [f"unknown {name}" for name in offered if name not in wanted]
    problems += [
        f"{name} is {offered[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in offered and tuple(offered[name]) != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"{reader.source} does not fit a {type(model).__name__}: {shown}")
    state = {
        name: reader.read(name).to(device=device, dtype=dtype, copy=True)
        for name in wanted
        if not leave or not name.startswith(leave)
    }
    model.load_state_dict(state, strict=not leave, assign=True)
