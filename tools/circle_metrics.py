"""Judges an edited picture of Fill Circles: PSNR, and the colours inside and outside the true circle.

A manifest entry is one item of the test.json that tools/fill_circles.py writes. Images are PIL images or uint8 arrays
(height, width, 3) of the entry's size. The same code on the VAE's round trip of the targets gives the ceiling.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that scripts beside this file can import it too

from tools.palette import COLOURS, nearest_colour

EDGE = 1.5
"""Pixels this near the circle's edge count neither as inside nor as outside: they are blended."""

Picture = Image.Image | np.ndarray


def as_array(image: Picture, entry: Mapping[str, object]) -> np.ndarray:
    """The picture as float64 (height, width, 3), 0-255; refuses another size than the entry's."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float64)
    expected = (entry["height"], entry["width"], 3)
    if pixels.shape != expected:
        raise ValueError(f"item {entry['stem']} is {expected} (height, width, channels), the image {pixels.shape}")
    return pixels


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = float(np.mean((np.asarray(image, np.float64) - np.asarray(target, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def circle_regions(entry: Mapping[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """Boolean maps (height, width): clearly inside and clearly outside the true circle."""
    rows, columns = np.mgrid[0 : entry["height"], 0 : entry["width"]] + 0.5
    distance = np.hypot(columns - entry["x"], rows - entry["y"])
    return distance < entry["radius"] - EDGE, distance > entry["radius"] + EDGE


def mean_colours(image: Picture, entry: Mapping[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """Mean RGB (0-255) inside and outside the true circle."""
    pixels = as_array(image, entry)
    inside, outside = circle_regions(entry)
    return pixels[inside].mean(axis=0), pixels[outside].mean(axis=0)


def judge(image: Picture, target: Picture, entry: Mapping[str, object]) -> dict[str, float]:
    """All measures of one picture; `both_colours_right` is 1 or 0."""
    inside, outside = mean_colours(image, entry)
    right = nearest_colour(inside) == entry["inside"] and nearest_colour(outside) == entry["outside"]
    return {
        "psnr": psnr(as_array(image, entry), as_array(target, entry)),
        "colour_distance_inside": math.dist(inside, COLOURS[entry["inside"]]),
        "colour_distance_outside": math.dist(outside, COLOURS[entry["outside"]]),
        "both_colours_right": float(right),
    }


def summarise(judgements: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over pictures, with their `count`."""
    rows = list(judgements)
    if not rows:
        raise ValueError("no pictures to summarise")
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {**means, "count": len(rows)}


def measure(
    images: Iterable[Picture], targets: Iterable[Picture], entries: Iterable[Mapping[str, object]]
) -> dict[str, float]:
    """The summary of many pictures."""
    return summarise(judge(*item) for item in zip(images, targets, entries, strict=True))


def ceiling(
    round_trip: Callable[[Image.Image], Picture],
    targets: Iterable[Image.Image],
    entries: Iterable[Mapping[str, object]],
) -> dict[str, float]:
    """The best a model could reach: the measures of `round_trip` (VAE encode, decode) of the targets."""
    targets = list(targets)
    return measure([round_trip(target) for target in targets], targets, entries)
