"""The four parts of every item, and the condition channels made of them.

A target, a condition image, a mask (1 = repaint) and whether the masked pixels of the condition image are blanked:
FLUX.1 Fill's 320 extra channels are a function of the last three. Caching, training, previews and inference all
build their condition here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.flow.packing import pack_latents, pack_mask


@dataclass(frozen=True)
class Item:
    """Pixels of one training or inference item; all parts share H and W, multiples of 16.

    target: (3, H, W) in [-1, 1], None at inference. condition: (3, H, W) in [-1, 1], before blanking.
    mask: (1, H, W) of zeros and ones. blanked: whether masked pixels of the condition become 0 (mid-grey).
    """

    target: Tensor | None
    condition: Tensor
    mask: Tensor
    blanked: bool

    def condition_pixels(self) -> Tensor:
        """The (3, H, W) pixels that the VAE encodes as the condition."""
        return self.condition * (1 - self.mask) if self.blanked else self.condition


@dataclass(frozen=True)
class Condition:
    """A batch of conditions: latents (B, 16, h, w), the posterior's mean in model space, and mask (B, 1, 8h, 8w)."""

    latents: Tensor
    mask: Tensor

    def channels(self) -> Tensor:
        """(B, N, 320): packed condition latents (64), then the packed mask (256), as FluxFillPipeline orders them."""
        return torch.cat([pack_latents(self.latents), pack_mask(self.mask).to(self.latents.dtype)], dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Condition":
        """The same condition on another device; ``dtype`` applies to both parts (a mask of 0 and 1 is exact in any)."""
        return Condition(self.latents.to(device, dtype), self.mask.to(device, dtype))
