"""Masks: drawn by seed, grown and moved before the threshold, binary in the end."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.data.masks import KINDS, MaskSettings, variants

SIZE = (96, 64)


def square(level: int = 255) -> Image.Image:
    mask = Image.new("L", SIZE, 0)
    mask.paste(level, (40, 24, 56, 40))
    return mask


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.where(mask.any(axis=1))[0], np.where(mask.any(axis=0))[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(("level", "repainted"), [(127, False), (128, True)])
def test_the_threshold_is_half(level: int, repainted: bool) -> None:
    (mask,) = variants(square(level), SIZE, "a", MaskSettings())
    assert mask.any() == repainted and mask.dtype == bool and mask.shape == (64, 96)


@pytest.mark.parametrize("growth", [-4, 0, 5])
def test_dilation_is_in_pixels(growth: int) -> None:
    (mask,) = variants(square(), SIZE, "a", MaskSettings(dilation=growth))
    assert box(mask) == (40 - growth, 24 - growth, 56 + growth, 40 + growth)


def test_dilation_comes_before_the_threshold() -> None:
    """A soft edge below the threshold does not count; grown from what is above it, it does."""
    soft = square()
    soft.paste(100, (56, 24, 60, 40))
    (mask,) = variants(soft, SIZE, "a", MaskSettings(dilation=3))
    assert box(mask)[2] == 59


def test_black_and_white_can_be_exchanged() -> None:
    plain, inverted = (variants(square(), SIZE, "a", MaskSettings(invert=flag))[0] for flag in (False, True))
    assert np.array_equal(plain, ~inverted)


def test_jitter_gives_different_masks_the_same_every_time() -> None:
    settings = MaskSettings(jitter=6, variants=8)
    made = variants(square(), SIZE, "a", settings)
    assert len(made) == settings.count(drawn=False) == 8
    assert len({mask.tobytes() for mask in made}) >= 7
    assert all(np.array_equal(*pair) for pair in zip(made, variants(square(), SIZE, "a", settings)))
    assert not np.array_equal(made[0], variants(square(), SIZE, "b", settings)[0])
    edges = np.array([box(mask) for mask in made])
    assert np.abs(edges - (40, 24, 56, 40)).max() <= 12


def test_the_full_mask_is_the_last_variant() -> None:
    made = variants(None, SIZE, "a", MaskSettings(kinds=("box",), variants=3, with_full=True))
    assert len(made) == 4 and made[-1].all() and not any(mask.all() for mask in made[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_masks_cover_something(kind: str) -> None:
    settings = MaskSettings(kinds=(kind,), variants=20)
    made = variants(None, SIZE, "a", settings)
    shares = [float(mask.mean()) for mask in made]
    assert all(0 < share <= 1 for share in shares)
    assert all(np.array_equal(*pair) for pair in zip(made, variants(None, SIZE, "a", settings)))
    assert (len({mask.tobytes() for mask in made}) > 1) == (kind != "full")
    if kind == "half":
        assert set(shares) == {0.5}
    if kind == "full":
        assert set(shares) == {1.0}


def test_several_kinds_take_turns() -> None:
    made = variants(None, SIZE, "a", MaskSettings(kinds=("full", "half"), variants=4))
    assert [mask.all() for mask in made] == [True, False, True, False]
