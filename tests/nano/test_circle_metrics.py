"""The metric of Fill Circles: exact on the truth, and it sees a wrong, swapped or shifted colour."""

import math

import numpy as np
import pytest
from PIL import Image

from tools import circle_metrics, fill_circles
from tools.palette import COLOURS, nearest_colour

CIRCLES = fill_circles.test_items({"unseen_pair": 16}, 64, 64, 0)
ENTRIES = [fill_circles.manifest_entry(circle) for circle in CIRCLES]
TARGETS = [fill_circles.draw_target(circle) for circle in CIRCLES]


def swapped(circle: fill_circles.Circle) -> Image.Image:
    values = {**circle.__dict__, "inside": circle.outside, "outside": circle.inside}
    return fill_circles.draw_target(fill_circles.Circle(**values))


def test_the_truth_is_perfect() -> None:
    found = circle_metrics.measure(TARGETS, TARGETS, ENTRIES)
    expected = {"colour_distance_inside": 0, "colour_distance_outside": 0, "both_colours_right": 1, "count": 16}
    assert found == {"psnr": math.inf, **expected}


def test_swapped_colours_are_wrong() -> None:
    found = circle_metrics.measure([swapped(circle) for circle in CIRCLES], TARGETS, ENTRIES)
    assert found["both_colours_right"] == 0
    inside, outside = COLOURS[CIRCLES[0].inside], COLOURS[CIRCLES[0].outside]
    one = circle_metrics.judge(swapped(CIRCLES[0]), TARGETS[0], ENTRIES[0])
    assert one["colour_distance_inside"] == pytest.approx(math.dist(inside, outside))


def test_one_wrong_colour_is_not_both_right() -> None:
    for circle, target, entry in zip(CIRCLES, TARGETS, ENTRIES, strict=True):
        flat = Image.new("RGB", (64, 64), COLOURS[circle.outside])
        assert circle_metrics.judge(flat, target, entry)["both_colours_right"] == 0


def test_psnr_by_hand() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert circle_metrics.psnr(black, grey) == pytest.approx(20 * math.log10(255 / 51))


def test_the_ceiling_uses_the_same_code() -> None:
    def worse(image: Image.Image) -> Image.Image:
        return image.resize((32, 32)).resize((64, 64))

    found = circle_metrics.ceiling(worse, TARGETS, ENTRIES)
    assert found == circle_metrics.measure([worse(target) for target in TARGETS], TARGETS, ENTRIES)
    assert 15 < found["psnr"] < 40


def test_every_palette_colour_is_its_own_nearest() -> None:
    assert all(nearest_colour(rgb) == name for name, rgb in COLOURS.items())


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="00000"):
        circle_metrics.judge(Image.new("RGB", (32, 64)), TARGETS[0], ENTRIES[0])
