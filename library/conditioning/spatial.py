"""`spatial`: source and target side by side on one canvas; one half is blanked and repainted from the other.

Both halves are exactly half the canvas: no column belongs to both, and training and inference mask the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.conditioning.mode import Images, Mode, ModeSettings

if TYPE_CHECKING:
    from torch import Tensor

    from library.conditioning.item import Item


class Spatial(Mode):
    """Source on the left, target on the right."""

    name = "spatial"
    needs = frozenset({"target"})
    takes = frozenset({"target"})
    settings = frozenset({"mask_only_right"})
    pictures_across = 2

    def items(self, images: Images, settings: ModeSettings) -> list[Item]:
        import torch

        from library.conditioning.item import Item

        assert images.target is not None, "spatial without a target: the plan lets no such item through"
        canvas = torch.cat([images.source, images.target], dim=-1)
        right = half_mask(images.source, right=True)
        masks = [right] if settings.mask_only_right else [right, half_mask(images.source, right=False)]
        return [Item(canvas, canvas, mask, blanked=True) for mask in masks]

    def request(self, image: Tensor, mask: Tensor | None, settings: ModeSettings) -> Item:
        import torch

        from library.conditioning.item import Item

        canvas = torch.cat([image, torch.zeros_like(image)], dim=-1)
        return Item(None, canvas, half_mask(image, right=True), blanked=True)

    def result(self, image: Tensor) -> Tensor:
        return image[..., image.shape[-1] // 2 :]


def half_mask(picture: Tensor, *, right: bool) -> Tensor:
    """The mask (1, H, 2W) of one half of the canvas for a picture (3, H, W)."""
    height, width = picture.shape[-2:]
    mask = picture.new_zeros(1, height, 2 * width)
    mask[..., width:] = float(right)
    mask[..., :width] = float(not right)
    return mask
