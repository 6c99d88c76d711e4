"""Pictures of any size meet the model at multiples of 16 and come back: never stretched, nothing lost unsaid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import DataError
from library.sampling.fit import Fit, fit_area, fit_own_size, fit_size

side = st.integers(16, 3000)


def check(fit: Fit) -> None:
    """What holds for every fit."""
    assert fit.canvas[0] % 16 == 0 and fit.canvas[1] % 16 == 0
    left, top, right, bottom = fit.box
    assert 0 <= left < right <= fit.canvas[0] and 0 <= top < bottom <= fit.canvas[1]
    across, down = fit.scaled[0] / fit.source[0], fit.scaled[1] / fit.source[1]
    # one scale: what the axes differ by is rounding to whole pixels
    assert abs(across - down) * fit.source[0] <= 1.0001 or abs(across - down) * fit.source[1] <= 1.0001


@settings(max_examples=200, deadline=None)
@given(width=side, height=side, resolution=st.integers(64, 2048))
def test_an_area_is_met_without_stretching(width: int, height: int, resolution: int) -> None:
    fit = fit_area((width, height), resolution**2)
    check(fit)
    assert fit.result == (width, height)
    assert fit.scaled[0] <= fit.canvas[0] and fit.scaled[1] <= fit.canvas[1], "an area never crops"
    # the picture lies in a corner, and at most one token's width is filled
    assert fit.canvas[0] - fit.scaled[0] < 16 and fit.canvas[1] - fit.scaled[1] < 16
    if max(width, height) < 4 * min(width, height) and resolution >= 256:
        assert 0.8 < fit.scaled[0] * fit.scaled[1] / resolution**2 < 1.25


@settings(max_examples=100, deadline=None)
@given(width=side, height=side)
def test_own_size_is_only_filled_up(width: int, height: int) -> None:
    fit = fit_own_size((width, height))
    check(fit)
    assert fit.scaled == fit.result == (width, height)


def test_a_picture_that_fits_is_left_alone() -> None:
    for fit in (fit_area((64, 128), 64 * 128), fit_own_size((64, 128)), fit_size((64, 128), 64, 128, "error", "a")):
        assert fit == Fit((64, 128), (64, 128), (64, 128), (0, 0), (0, 0, 64, 128), (64, 128))
        assert fit.words() == "64x128"


@settings(max_examples=200, deadline=None)
@given(source=st.tuples(side, side), wanted=st.tuples(side, side), how=st.sampled_from(["crop", "pad"]))
def test_a_size_is_met_by_cropping_or_padding(source: tuple, wanted: tuple, how: str) -> None:
    fit = fit_size(source, *wanted, how, "a.png")
    assert fit.result == wanted
    assert fit.canvas[0] - wanted[0] < 16 and fit.canvas[1] - wanted[1] < 16
    assert fit.box == (0, 0, *wanted)
    if how == "crop":
        assert fit.scaled[0] >= wanted[0] and fit.scaled[1] >= wanted[1]
    else:
        assert fit.scaled[0] <= wanted[0] and fit.scaled[1] <= wanted[1]


def test_another_aspect_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"photo\.jpg is 300x200.*64x64.*fit"):
        fit_size((300, 200), 64, 64, "error", "photo.jpg")


def test_one_side_is_completed_by_the_aspect() -> None:
    assert fit_size((300, 200), 150, None, "error", "a").result == (150, 100)
    assert fit_size((300, 200), None, 400, "error", "a").result == (600, 400)


def test_the_words_tell_what_is_done() -> None:
    assert fit_area((100, 75), 64 * 64).words() == "100x75, scaled to 64x48, result 100x75"
    assert fit_area((100, 72), 96**2).words() == "100x72, scaled to 111x80, edges repeated up to 112x80, result 100x72"
    assert fit_size((300, 200), 64, 64, "crop", "a").words() == "300x200, scaled to 96x64, cropped to 64x64"
