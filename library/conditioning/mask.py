"""`mask`: the masked area is repainted from what surrounds it, as FLUX.1 Fill was made to do.

With a target of its own ("remove what is masked"), the surroundings come from the source, the result from the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.conditioning.mode import Images, Mode, ModeSettings

if TYPE_CHECKING:
    from torch import Tensor

    from library.conditioning.item import Item


class Masked(Mode):
    """Image with a hole in, whole image out."""

    name = "mask"
    needs = frozenset({"mask"})
    takes = frozenset({"target", "mask"})

    def items(self, images: Images, settings: ModeSettings) -> list[Item]:
        from library.conditioning.item import Item

        assert images.masks, "mask mode without a mask: the plan lets no such item through"
        target = images.source if images.target is None else images.target
        return [Item(target, images.source, mask, blanked=True) for mask in images.masks]

    def request(self, image: Tensor, mask: Tensor | None, settings: ModeSettings) -> Item:
        from library.conditioning.item import Item

        if mask is None:
            raise ValueError("mode mask needs a mask: white is repainted")
        return Item(None, image, mask, blanked=True)
