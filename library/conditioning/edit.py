"""`edit`: the target is made from the whole, unblanked source; the mask is white unless a region is given.

As ComfyUI's InstructPixToPixConditioning on FLUX.1 Fill, which fills the mask channels with ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.conditioning.mode import Images, Mode, ModeSettings, full_mask

if TYPE_CHECKING:
    from torch import Tensor

    from library.conditioning.item import Item


class Edit(Mode):
    """Source in, edited target out."""

    name = "edit"
    needs = frozenset({"target"})
    takes = frozenset({"target", "mask"})
    settings = frozenset({"edit_mask_value"})

    def items(self, images: Images, settings: ModeSettings) -> list[Item]:
        from library.conditioning.item import Item

        masks = images.masks or (full_mask(images.source, settings.edit_mask_value),)
        return [Item(images.target, images.source, mask, blanked=False) for mask in masks]

    def request(self, image: Tensor, mask: Tensor | None, settings: ModeSettings) -> Item:
        from library.conditioning.item import Item

        region = full_mask(image, settings.edit_mask_value) if mask is None else mask
        return Item(None, image, region, blanked=False)
