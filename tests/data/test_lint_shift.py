"""The shift detector: exact on moved pictures, silent on edited ones."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.data.lint.shift import global_shift

SIDE = 160
MARGIN = 24


def texture(seed: int, side: int = SIDE + 2 * MARGIN) -> np.ndarray:
    """A picture with the spectrum of a photograph, (side, side) of 0 to 255."""
    noise = np.fft.rfft2(np.random.default_rng(seed).normal(size=(side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    picture = np.fft.irfft2(noise / frequency**1.2, s=(side, side))
    return np.clip((picture - picture.mean()) / picture.std() * 45 + 128, 0, 255)


def window(picture: np.ndarray, x: int = 0, y: int = 0) -> np.ndarray:
    """The middle of a picture whose content is moved to the right by x and down by y."""
    return picture[MARGIN - y : MARGIN - y + SIDE, MARGIN - x : MARGIN - x + SIDE]


def edited(picture: np.ndarray, seed: int, share: float) -> np.ndarray:
    """Another texture in the upper left corner."""
    side = round(SIDE * share)
    result = picture.copy()
    result[:side, :side] = texture(seed)[:side, :side]
    return result


@pytest.mark.parametrize("x, y", [(1, 0), (0, -1), (3, 2), (-8, 5), (18, -17)])
def test_a_moved_picture_is_measured(x: int, y: int) -> None:
    picture = texture(0)
    found = global_shift(window(picture), window(picture, x, y))
    assert found is not None and found.x == pytest.approx(x, abs=0.1) and found.y == pytest.approx(y, abs=0.1)


@pytest.mark.parametrize("seed", range(12))
def test_a_shift_is_found_under_an_edit_noise_and_other_brightness(seed: int) -> None:
    picture, draw = texture(seed), np.random.default_rng(seed)
    x, y = (int(value) for value in draw.choice([-9, -5, -2, 2, 4, 8], 2))
    target = edited(window(picture, x, y), seed + 50, 0.5) * 0.7 + 20 + draw.normal(0, 3, (SIDE, SIDE))
    found = global_shift(window(picture), target)
    assert found is not None and found.x == pytest.approx(x, abs=0.7) and found.y == pytest.approx(y, abs=0.7)


@pytest.mark.parametrize("seed", range(12))
def test_edits_of_any_size_are_no_shift(seed: int) -> None:
    source = window(texture(seed))
    for share in (0.2, 0.5, 0.8, 1.0):
        assert global_shift(source, edited(source, seed + 50, share)) is None


def test_half_a_pixel_of_a_resampling_filter_is_no_shift() -> None:
    picture = Image.fromarray(texture(1).astype(np.uint8))
    half = picture.resize((104, 104), Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BICUBIC)
    assert global_shift(window(np.asarray(picture)), window(np.asarray(half))) is None


def test_a_moved_object_is_no_moved_picture() -> None:
    background, thing = window(texture(2)), window(texture(3))[:40, :40]
    source, target = background.copy(), background.copy()
    source[60:100, 50:90] = thing
    target[60:100, 62:102] = thing
    assert global_shift(source, target) is None


@pytest.mark.parametrize("name", ["flat", "stripes", "noise", "inverted"])
def test_pictures_that_can_fool_a_correlation(name: str) -> None:
    source = window(texture(4))
    stripes = np.tile((np.arange(SIDE) // 8 % 2) * 200.0, (SIDE, 1))
    pairs = {
        "flat": (np.full((SIDE, SIDE), 3.0), np.full((SIDE, SIDE), 9.0)),
        "stripes": (stripes, stripes * 0.5 + 20),
        "noise": (source, source + np.random.default_rng(0).normal(0, 8, source.shape)),
        "inverted": (source, 255 - source),
    }
    assert global_shift(*pairs[name]) is None
