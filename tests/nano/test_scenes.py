"""The base's training pictures: deterministic, captioned within T5's length, and without the edit task."""

import random

import numpy as np

from tools.nano.masks import blank, make_mask
from tools.nano.scenes import PAINTERS, make_scene
from tools.nano.texts import T5_LENGTH, dress
from tools.palette import COLOURS


def test_the_same_number_gives_the_same_scene_and_mask() -> None:
    for index in range(50):
        one, two = make_scene(0, index, 128, 64), make_scene(0, index, 128, 64)
        assert one.image.tobytes() == two.image.tobytes()
        assert one.caption == two.caption
        assert make_mask(0, index, 64, 64).tobytes() == make_mask(0, index, 64, 64).tobytes()
    assert make_scene(0, 1).image.tobytes() != make_scene(1, 1).image.tobytes()


def test_every_kind_and_size_is_drawn() -> None:
    for size in ((64, 64), (128, 64), (64, 128), (96, 96)):
        scenes = [make_scene(0, index, *size) for index in range(300)]
        assert all(scene.image.size == size for scene in scenes)
        assert set(PAINTERS) <= {scene.kind for scene in scenes}


def test_captions_fit_and_name_colours() -> None:
    for index in range(2000):
        scene = make_scene(0, index, *random.Random(index).choice([(64, 64), (128, 64)]))
        words = dress(scene.caption, random.Random(index)).lower().rstrip(".").split()
        assert len(words) + 2 <= T5_LENGTH, scene.caption
        assert set(words) & set(COLOURS), scene.caption


def test_no_picture_shows_an_outline_beside_a_filled_shape() -> None:
    scenes = [make_scene(0, index, 128, 64) for index in range(1500)]
    assert {"filled", "outline"} <= {part for scene in scenes for part in scene.parts}
    assert all(len(set(scene.parts)) <= 1 for scene in scenes)


def test_the_condition_is_the_picture_blanked_by_its_mask() -> None:
    pixels = np.asarray(make_scene(0, 3).image, dtype=np.float32) / 127.5 - 1
    fulls = 0
    for index in range(200):
        mask = np.asarray(make_mask(0, index, 64, 64), dtype=np.float32)[..., None] / 255
        assert set(np.unique(mask)) <= {0.0, 1.0}
        assert mask.max() == 1, "an empty mask would show the whole picture, as an edit does"
        condition = blank(pixels, mask)
        assert not condition[mask[..., 0] == 1].any()
        assert np.array_equal(condition[mask[..., 0] == 0], pixels[mask[..., 0] == 0])
        fulls += mask.min() == 1
    assert 40 < fulls < 120
