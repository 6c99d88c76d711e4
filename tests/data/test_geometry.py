"""One scale and one crop for all images of an item, in buckets of one area."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.buckets import Bucketing
from library.data.geometry import Geometry, crop_box, cut, fitted, same_aspect

SIDES = st.integers(16, 4000)


@given(SIDES, SIDES, st.sampled_from([(256, 16), (512, 64), (768, 32), (1024, 64)]), st.booleans())
def test_a_bucket_is_aligned_near_the_area_and_never_stretches(width, height, sizes, no_upscale) -> None:
    resolution, step = sizes
    bucketing = Bucketing(resolution, step=step, no_upscale=no_upscale)
    bucket = bucketing.choose(width, height)
    assert bucket[0] % 16 == 0 and bucket[1] % 16 == 0
    unscaled = bucketing.keeps_scale(width, height)
    box = crop_box((width, height), bucket, (0.5, 0.5), unscaled=unscaled)
    assert 0 <= box[0] < box[2] <= 1 + 1e-9 and 0 <= box[1] < box[3] <= 1 + 1e-9
    scale_x = bucket[0] / (width * (box[2] - box[0]))
    scale_y = bucket[1] / (height * (box[3] - box[1]))
    assert scale_x == pytest.approx(scale_y, rel=1e-9)
    if unscaled:
        assert scale_x == pytest.approx(1)
    elif not no_upscale:
        assert 0.7 < bucket[0] * bucket[1] / resolution**2 < 1.35


@given(SIDES, SIDES, st.floats(0.25, 4), st.booleans())
def test_pictures_of_two_scales_are_cut_at_the_same_places(width, height, scale, flip) -> None:
    """A ramp tells where every pixel came from."""
    width, height = max(width // 8, 32), max(height // 8, 32)
    other = (max(16, round(width * scale)), max(16, round(height * scale)))
    box = crop_box((width, height), (64, 48), (0.3, 0.8), unscaled=False)
    geometry = Geometry(64, 48, box, flip)
    ramps = []
    for size in ((width, height), other):
        row = np.linspace(0, 1, size[0], endpoint=False) + 0.5 / size[0]
        ramps.append(cut(Image.fromarray(np.tile(row.astype(np.float32), (size[1], 1))), geometry, "bilinear"))
    first, second = (np.asarray(ramp)[:, 4:-4] for ramp in ramps)
    assert np.abs(first - second).max() < 0.5 / min(width, other[0]) + 1e-3


def test_a_mirror_image_is_the_mirror_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    plain, mirrored = (cut(image, Geometry(32, 32, (0.25, 0, 1, 1), flip), None) for flip in (False, True))
    assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(mirrored))


def test_the_halves_of_a_canvas_are_cut_like_single_pictures() -> None:
    left, right = (Image.fromarray(np.random.default_rng(n).integers(0, 256, (48, 64, 3), np.uint8)) for n in (1, 2))
    canvas = Image.new("RGB", (128, 48))
    canvas.paste(left, (0, 0))
    canvas.paste(right, (64, 0))
    geometry = Geometry(32, 32, (0.1, 0.0, 0.85, 1.0))
    for picture, region in ((left, (0.0, 0.0, 0.5, 1.0)), (right, (0.5, 0.0, 1.0, 1.0))):
        alone = np.asarray(cut(picture, geometry, None)).astype(int)
        joined = np.asarray(cut(canvas, geometry, None, region)).astype(int)
        inside = slice(1, -1)  # the outermost columns average over the seam
        assert np.abs(alone - joined)[:, inside].max() <= 1


def test_untouched_pictures_stay_untouched() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert np.array_equal(np.asarray(cut(image, Geometry(64, 64, (0, 0, 1, 1)), None)), np.asarray(image))


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_another_aspect_is_cropped_or_padded_never_stretched(how: str) -> None:
    image = Image.new("RGB", (60, 30), "black")
    image.paste("white", (20, 5, 40, 25))
    made = fitted(image, (64, 64), how, "#ff0000")
    assert made.size == ((30, 30) if how == "crop" else (60, 60))
    white = (np.asarray(made) == 255).all(axis=2)
    assert white.any(axis=0).sum() == white.any(axis=1).sum() == 20
    assert (made.getpixel((0, 0)) == (255, 0, 0)) == (how == "pad")


@given(SIDES, SIDES, st.floats(0.05, 1), st.sampled_from([math.floor, round, math.ceil]))
def test_sizes_that_differ_by_rounding_have_one_aspect(width, height, scale, rounding) -> None:
    small = (max(1, rounding(width * scale)), max(1, rounding(height * scale)))
    assert same_aspect((width, height), small) and same_aspect(small, (width, height))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((512, 512), (512, 511), True),
        ((512, 512), (512, 510), False),
        ((512, 512), (512, 508), False),
        ((1024, 1024), (1014, 1024), False),
        ((1024, 683), (512, 341), True),
        ((1024, 683), (512, 343), False),
        ((513 / 2, 256), (257, 256), True),
    ],
)
def test_an_aspect_may_differ_by_one_pixel_of_the_smaller_picture(first, second, same) -> None:
    """Two percent of a picture's height, spread over it, moves its lower edge by ten pixels at 512."""
    assert same_aspect(first, second) == same_aspect(second, first) == same


def test_buckets_off_gives_the_resolution() -> None:
    assert Bucketing((500, 260), enabled=False).choose(1000, 20) == (496, 256)
    assert Bucketing((500, 260), enabled=False).sizes() == [(496, 256)]
