"""Whether a target is its source moved by a few pixels, as happens when a pair is resized or cropped in two ways.

Phase correlation (Kuglin and Hines, "The Phase Correlation Image Alignment Method", 1975) proposes one shift for the
whole picture; it counts only if most parts of the picture agree with it, so that a moved object is not taken for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = 0.75  # pixels; below it a resampling filter's own half pixel could speak
LARGEST = 1 / 8  # of a side
BLUR = 0.25  # of the band: frequencies above it are mostly noise and compression
TILES = 6  # across and down
TEXTURE = 4.0  # grey levels of deviation that make a tile comparable
LIKENESS = 0.5  # correlation that a tile needs, moved or not, to say anything: an edited one has none
FITTING = 0.8  # correlation that a tile needs, moved, to agree
GAIN = 0.6  # ... and moving has to take away this share of what kept it from correlating
AGREEMENT = 0.6  # of the tiles that can say something
FEWEST_TILES = 4


@dataclass(frozen=True)
class Shift:
    """How far the target lies from the source, in pixels to the right and down, and how many tiles agree."""

    x: float
    y: float
    agreement: float


def global_shift(source: np.ndarray, target: np.ndarray) -> Shift | None:
    """The shift between two grey pictures (H, W) of one size, or None if there is none that holds for the whole."""
    source, target = source.astype(np.float32), target.astype(np.float32)
    x, y = _peak(_correlation(source, target))
    if max(abs(x), abs(y)) < SMALLEST:
        return None
    agreement = _agreement(source, target, round(x), round(y))
    return Shift(x, y, agreement) if agreement >= AGREEMENT else None


def _correlation(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(H, W): how well the target fits the source at each shift, shift (0, 0) in the corner."""
    height, width = source.shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1]).astype(np.float32)
    first, second = (np.fft.rfft2((picture - picture.mean()) * window) for picture in (source, target))
    cross = second * first.conj()
    cross /= np.abs(cross) + 1e-6 * np.abs(cross).max() + 1e-12
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    cross *= np.exp(-(vertical**2 + horizontal**2) / (2 * (BLUR / 2) ** 2)).astype(np.float32)
    return np.fft.irfft2(cross, s=(height, width))


def _peak(correlation: np.ndarray) -> tuple[float, float]:
    """(x, y) of the highest value among shifts up to LARGEST, between the pixels by a parabola through neighbours."""
    height, width = correlation.shape
    far_y, far_x = max(1, int(height * LARGEST)), max(1, int(width * LARGEST))
    near = np.roll(correlation, (far_y + 1, far_x + 1), axis=(0, 1))[: 2 * far_y + 3, : 2 * far_x + 3]
    row, column = np.unravel_index(np.argmax(near[1:-1, 1:-1]), (2 * far_y + 1, 2 * far_x + 1))
    row, column = int(row) + 1, int(column) + 1
    x = column - far_x - 1 + _vertex(near[row, column - 1 : column + 2])
    y = row - far_y - 1 + _vertex(near[row - 1 : row + 2, column])
    return float(x), float(y)


def _vertex(values: np.ndarray) -> float:
    """Where, in -0.5 to 0.5, a parabola through three values around a maximum is highest."""
    left, middle, right = (float(value) for value in values)
    curve = left - 2 * middle + right
    return 0.0 if curve >= 0 else min(0.5, max(-0.5, 0.5 * (left - right) / curve))


def _agreement(source: np.ndarray, target: np.ndarray, x: int, y: int) -> float:
    """The share of comparable tiles that fit clearly better when moved; 0 if those are few or all in one place."""
    height, width = source.shape
    votes, places = [], []
    for row in range(TILES):
        for column in range(TILES):
            top, bottom = height * row // TILES, height * (row + 1) // TILES
            left, right = width * column // TILES, width * (column + 1) // TILES
            moved = (slice(top + y, bottom + y), slice(left + x, right + x))
            if top + y < 0 or left + x < 0 or bottom + y > height or right + x > width:
                continue
            tile = source[top:bottom, left:right]
            still_fits, moved_fits = _likeness(tile, target[top:bottom, left:right]), _likeness(tile, target[moved])
            if max(still_fits, moved_fits) >= LIKENESS:
                votes.append(moved_fits >= FITTING and 1 - moved_fits <= (1 - GAIN) * (1 - still_fits))
                places.append((row, column))
    if len(votes) < FEWEST_TILES or not _spread(places):
        return 0.0
    return sum(votes) / len(votes)


def _spread(places: list[tuple[int, int]]) -> bool:
    """Whether tiles reach over at least half the picture in both directions."""
    rows, columns = zip(*places, strict=True)
    return all(max(values) - min(values) + 1 >= TILES / 2 for values in (rows, columns))


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised correlation of two tiles; 0 where one of them is flat."""
    first, second = first - first.mean(), second - second.mean()
    lengths = float(np.sqrt((first**2).mean())), float(np.sqrt((second**2).mean()))
    if min(lengths) < TEXTURE:
        return 0.0
    return float((first * second).mean()) / (lengths[0] * lengths[1])
