"""What a conditioning mode has to say, and the pixels it is given to say it with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from library.conditioning.item import Item


@dataclass(frozen=True)
class ModeSettings:
    """What a mode may depend on.

    edit_mask_value: what fills the mask channels of an `edit` without a region mask.
    mask_only_right: `spatial` repaints the right half only, otherwise left and right are two variants.
    """

    edit_mask_value: float = 1.0
    mask_only_right: bool = False


@dataclass(frozen=True)
class Images:
    """The pixels of one item after geometry: all of one size, multiples of 16.

    source, target: (3, H, W) in [-1, 1]. masks: variants, each (1, H, W) of zeros and ones.
    """

    source: Tensor
    target: Tensor | None = None
    masks: tuple[Tensor, ...] = ()


class Mode(ABC):
    """One way to condition. Stateless: a mode is a value, not a branch.

    name: what `mode = "..."` says.
    needs, takes: the kinds of images ("target", "mask") an item must have, and may have, beside its source.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    takes: ClassVar[frozenset[str]]
    settings: ClassVar[frozenset[str]] = frozenset()
    """The fields of ModeSettings it depends on."""
    pictures_across: ClassVar[int] = 1
    """How many pictures lie side by side on what the model sees: its width is that many pictures' width."""

    @abstractmethod
    def items(self, images: Images, settings: ModeSettings) -> list[Item]:
        """The condition variants of one training item; called once for each cached geometry, when it is encoded.

        All of them share one target.
        """

    @abstractmethod
    def request(self, image: Tensor, mask: Tensor | None, settings: ModeSettings) -> Item:
        """What to encode for a preview or an inference: image (3, H, W) in [-1, 1], mask (1, H, W) or None.

        Raises ValueError if the mode needs a mask and there is none.
        """

    def result(self, image: Tensor) -> Tensor:
        """The user's part (..., H, W) of what the model painted (..., H, W')."""
        return image

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Size of what the model sees for pictures of (width, height)."""
        return width * self.pictures_across, height


def full_mask(like: Tensor, value: float = 1.0) -> Tensor:
    """A constant mask (1, H, W) for pixels (3, H, W)."""
    return like.new_full((1, *like.shape[-2:]), value)
