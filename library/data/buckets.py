"""Aspect buckets: sizes of about one area, so that pictures of any shape train together without being stretched."""

from __future__ import annotations

import math
from dataclasses import dataclass

ALIGNMENT = 16  # pixels of one token: 8 of the VAE, 2 of the patch


@dataclass(frozen=True)
class Bucketing:
    """How sizes are chosen for one resolution: a side length, or (width, height)."""

    resolution: int | tuple[int, int]
    enabled: bool = True
    shortest: int | None = None
    longest: int | None = None
    step: int = 64
    no_upscale: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """The resolution itself, rounded to the alignment."""
        sides = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        return tuple(max(ALIGNMENT, round(side / ALIGNMENT) * ALIGNMENT) for side in sides)

    @property
    def area(self) -> int:
        """Pixels that every bucket comes close to."""
        return self.size[0] * self.size[1]

    def sizes(self) -> list[tuple[int, int]]:
        """All buckets (width, height), the resolution itself first."""
        if not self.enabled:
            return [self.size]
        side = math.sqrt(self.area)
        shortest = self._aligned(self.shortest or side / 2, math.ceil)
        longest = self._aligned(self.longest or side * 2, math.floor)
        found = [self.size]
        for width in range(shortest, longest + 1, self.step):
            height = self._aligned(self.area / width, round)
            if shortest <= height <= longest:
                found += [(width, height), (height, width)]
        return list(dict.fromkeys(found))

    def _aligned(self, side: float, rounding) -> int:
        return max(self.step, int(rounding(side / self.step)) * self.step)

    def choose(self, width: int, height: int) -> tuple[int, int]:
        """The bucket for a picture of (width, height): the nearest aspect."""
        if self.keeps_scale(width, height):
            return self._aligned(width, math.floor), self._aligned(height, math.floor)
        aspect = math.log(width / height)
        return min(self.sizes(), key=lambda size: abs(math.log(size[0] / size[1]) - aspect))

    def keeps_scale(self, width: int, height: int) -> bool:
        """Whether a picture is small enough to be cropped to its bucket without being enlarged."""
        small = width * height <= self.area and min(width, height) >= self.step
        return self.enabled and self.no_upscale and small
