"""From a picture of any size to the sizes FLUX works at, and back: one scale for both axes, never a stretch.

FLUX needs sides that are multiples of 16. A picture is scaled to the network's resolution, the few missing pixels are
filled by repeating its edge, and the result is cropped and scaled back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.errors import DataError

STEP = 16
MAX_PIXELS = 178_956_970
"""The largest picture that is decoded."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How one picture meets its canvas. All sizes are (width, height).

    source: the picture. scaled: the same, resized. canvas: what the model sees, multiples of 16. offset: where the
    scaled picture's corner lies on the canvas (negative: cropped). box: the part of the canvas that is the result
    (left, top, right, bottom). result: the size the result is given in the end.
    """

    source: Size
    scaled: Size
    canvas: Size
    offset: tuple[int, int]
    box: tuple[int, int, int, int]
    result: Size

    def words(self) -> str:
        """What happens to the picture, for the log: nothing is done to it silently."""
        parts = [f"{_times(self.source)}"]
        if self.scaled != self.source:
            parts.append(f"scaled to {_times(self.scaled)}")
        wanted = (self.box[2] - self.box[0], self.box[3] - self.box[1])
        shown = (min(self.scaled[0], wanted[0]), min(self.scaled[1], wanted[1]))
        if shown != self.scaled:
            parts.append(f"cropped to {_times(shown)}")
        if shown != self.canvas:
            parts.append(f"edges repeated up to {_times(self.canvas)}")
        if self.result != self.canvas:
            parts.append(f"result {_times(self.result)}")
        return ", ".join(parts)


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def up_to_step(side: int) -> int:
    """The next multiple of 16."""
    return math.ceil(side / STEP) * STEP


def fit_area(source: Size, area: int, keep_size: bool = True) -> Fit:
    """Scale a picture to about `area` pixels, so that one side is a multiple of 16 and the other needs least filling.

    keep_size: the result returns to the picture's own size; otherwise it stays as scaled.
    """
    width, height = source
    scale = math.sqrt(area / (width * height))
    candidates = []
    for scaled_side, side in ((width * scale, width), (height * scale, height)):
        exact = max(STEP, round(scaled_side / STEP) * STEP)
        scaled = (max(1, round(width * exact / side)), max(1, round(height * exact / side)))
        canvas = (up_to_step(scaled[0]), up_to_step(scaled[1]))
        filling = canvas[0] * canvas[1] - scaled[0] * scaled[1]
        candidates.append((filling / (canvas[0] * canvas[1]), scaled, canvas))
    _, scaled, canvas = min(candidates)
    return Fit(source, scaled, canvas, (0, 0), (0, 0, *scaled), source if keep_size else scaled)


def fit_own_size(source: Size) -> Fit:
    """Work at the picture's own size: only its edges are repeated up to multiples of 16."""
    canvas = (up_to_step(source[0]), up_to_step(source[1]))
    return Fit(source, source, canvas, (0, 0), (0, 0, *source), source)


def fit_size(source: Size, width: int | None, height: int | None, how: str, name: str) -> Fit:
    """Make the result `width` x `height`; one of them alone is completed by the picture's aspect.

    how: what to do when the aspects differ by more than rounding: `error`, `crop` (the centre is kept) or `pad`.
    Raises DataError naming the picture `name`.
    """
    wanted = _complete(source, width, height)
    canvas = (up_to_step(wanted[0]), up_to_step(wanted[1]))
    ratios = (wanted[0] / source[0], wanted[1] / source[1])
    same = abs(source[0] * ratios[1] - wanted[0]) < 1 or abs(source[1] * ratios[0] - wanted[1]) < 1
    if same:
        return Fit(source, wanted, canvas, (0, 0), (0, 0, *wanted), wanted)
    if how == "error":
        raise DataError(
            f"{name} is {_times(source)}, which has another aspect than the {_times(wanted)} asked for: give only "
            'width or only height, or set fit = "crop" or fit = "pad"'
        )
    scale = max(ratios) if how == "crop" else min(ratios)
    scaled = (max(1, round(source[0] * scale)), max(1, round(source[1] * scale)))
    offset = ((wanted[0] - scaled[0]) // 2, (wanted[1] - scaled[1]) // 2)
    return Fit(source, scaled, canvas, offset, (0, 0, *wanted), wanted)


def _complete(source: Size, width: int | None, height: int | None) -> Size:
    if width is None:
        assert height is not None
        return max(1, round(source[0] * height / source[1])), height
    if height is None:
        return width, max(1, round(source[1] * width / source[0]))
    return width, height
