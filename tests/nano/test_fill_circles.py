"""The example data set: deterministic, in the promised folders, true geometry, pairs that training never saw."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import fill_circles
from tools.palette import COLOURS, SEEN_COLOURS, UNSEEN_COLOURS, held_out_pairs, nearest_colour, training_pairs

FOLDERS = ("train_A", "train_B", "train_combined", "prompts", "prompts_combined")
TEST_FOLDERS = ("test_A", "test_B", "test_combined", "test_prompts", "test_prompts_combined")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        fill_circles.generate(tmp_path / name, 6, 4, seed=seed, num_unseen_words=2, num_seen_pairs=2)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    assert one != other


def test_folders_stems_and_sizes(tmp_path: Path) -> None:
    fill_circles.generate(tmp_path, 5, 4, size=(96, 64), num_unseen_words=3, num_seen_pairs=2)
    for names, count in ((FOLDERS, 5), (TEST_FOLDERS, 9)):
        stems = [sorted(path.stem for path in (tmp_path / name).iterdir()) for name in names]
        assert all(found == stems[0] for found in stems)
        assert len(stems[0]) == count
    assert Image.open(tmp_path / "train_A" / "00000.png").size == (96, 64)
    assert Image.open(tmp_path / "train_combined" / "00000.png").size == (192, 64)


def test_a_smaller_set_is_the_beginning_of_a_larger_one() -> None:
    assert fill_circles.training_items(10, 64, 64, 0) == fill_circles.training_items(500, 64, 64, 0)[:10]


def test_held_out_pairs_are_never_trained_on() -> None:
    trained = {(circle.inside, circle.outside) for circle in fill_circles.training_items(1000, 64, 64, 0)}
    test = fill_circles.test_items({"unseen_pair": 200, "unseen_word": 40, "seen_pair": 40}, 64, 64, 0)
    splits = {split: {(c.inside, c.outside) for c in test if c.split == split} for split in fill_circles.PAIRS}
    assert sum(circle.split == "unseen_pair" for circle in test) == 200
    assert splits["unseen_pair"] == set(held_out_pairs())
    assert not splits["unseen_pair"] & trained
    assert splits["seen_pair"] <= set(training_pairs())
    assert trained == set(training_pairs())
    assert all(set(pair) & set(UNSEEN_COLOURS) for pair in splits["unseen_word"])
    assert not {word for pair in trained for word in pair} & set(UNSEEN_COLOURS)
    assert all(circle.pair_seen == (circle.split == "seen_pair") for circle in test)


def test_each_seen_colour_keeps_partners_in_both_roles() -> None:
    for name in SEEN_COLOURS:
        assert sum(pair[0] == name for pair in training_pairs()) == 11
        assert sum(pair[1] == name for pair in training_pairs()) == 11


def test_the_manifest_tells_the_truth_about_the_picture(tmp_path: Path) -> None:
    fill_circles.generate(tmp_path, 0, 8, num_unseen_words=4, num_seen_pairs=0)
    items = json.loads((tmp_path / "test.json").read_text())["items"]
    assert len(items) == 12
    for item in items:
        target = np.asarray(Image.open(tmp_path / "test_B" / f"{item['stem']}.png"))
        source = np.asarray(Image.open(tmp_path / "test_A" / f"{item['stem']}.png"))
        assert tuple(target[int(item["y"]), int(item["x"])]) == COLOURS[item["inside"]]
        assert nearest_colour(target[0, 0]) == item["outside"]
        assert source[int(item["y"]), int(item["x"])].max() == 0
        assert source[int(item["y"]), int(item["x"] + item["radius"] - 1)].max() > 100
        text = (tmp_path / "test_prompts" / f"{item['stem']}.txt").read_text().strip()
        assert text == f"{item['inside']} circle with {item['outside']} background" == item["prompt"]


@pytest.mark.parametrize("arguments", [["--size", "60"], ["--size", "16"], ["--num_train", "-1"]])
def test_wrong_numbers_are_named(arguments: list[str], tmp_path: Path) -> None:
    script = Path(fill_circles.__file__)
    command = [sys.executable, str(script), "--output_dir", str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert arguments[1] in result.stderr
    assert "Traceback" not in result.stderr
