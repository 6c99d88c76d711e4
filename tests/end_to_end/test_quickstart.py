"""The quickstart: its commands are plain ones, its comparison measures what it says, and its result is good enough."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from library.config import load
from library.errors import DataError
from tests.end_to_end.scripts import ROOT, run_script, succeeded
from tools import compare_circles, quickstart
from tools.compare_circles import COLUMNS, SHOWN, compare, draw_grid, read_manifest

DATA = Path("data/fill_circles")


def test_its_commands_are_the_documented_ones() -> None:
    scripts = [shlex.split(command)[0] for command in quickstart.COMMANDS]
    assert scripts == [
        "tools/fill_circles.py", "influx_cache.py", "influx_train.py", "influx_infer.py", "influx_infer.py",
        "tools/compare_circles.py",
    ]  # fmt: skip
    assert all((ROOT / script).is_file() for script in scripts)
    run = load(["--config_file", str(ROOT / quickstart.CONFIG)], "train")
    assert run.saving.output_dir == ROOT / quickstart.OUTPUT
    assert f"{run.saving.output_name}.safetensors" in quickstart.RESULTS


def test_an_earlier_quickstart_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    assert quickstart.move_aside(folder) is None
    for number in (1, 2):
        folder.mkdir()
        (folder / "mine").write_text(str(number))
        assert quickstart.move_aside(folder) == tmp_path / f"quickstart-{number}"
    assert (tmp_path / "quickstart-1" / "mine").read_text() == "1"


@pytest.fixture
def perfect(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Results as good as can be (the targets) and as bad as an untouched source."""
    for name, source in (("good", "test_B"), ("bad", "test_A")):
        (tmp_path / name).mkdir()
        for path in (project / DATA / source).glob("*.png"):
            Image.open(path).save(tmp_path / name / path.name)
    return tmp_path / "good", tmp_path / "bad"


def test_the_numbers_tell_good_from_bad(perfect: tuple[Path, Path], project: Path, tmp_path: Path) -> None:
    good, bad = perfect
    compare(project / DATA, bad, good, str(project / "nano"), tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert found["after"]["both_colours_right"] == 1 and found["before"]["both_colours_right"] == 0
    assert found["after"]["colour_distance_inside"] < 1 < found["before"]["colour_distance_inside"]
    assert found["before"]["psnr"] < found["ceiling"]["psnr"] < found["after"]["psnr"]
    assert found["ceiling"]["psnr"] > 20, "the nano VAE keeps its pictures"
    assert found["split"] == "unseen_pair" and set(found["other_splits"]) == {"unseen_word", "seen_pair"}
    grid = Image.open(tmp_path / "comparison.png")
    rows = sum(min(count, len([e for e in read_manifest(project / DATA) if e["split"] == split]))
               for split, count in SHOWN.items())  # fmt: skip
    assert grid.width > len(COLUMNS) * 128 and grid.height > rows * 128


def test_the_grid_shows_each_picture_under_its_label(perfect: tuple[Path, Path], project: Path) -> None:
    good, bad = perfect
    grid = draw_grid(project / DATA, bad, good)
    middle = compare_circles.MARGIN + 2 * compare_circles.LINE + 64
    pixels = [grid.getpixel((12 + number * 140 + 64, middle)) for number in range(4)]
    assert pixels[0] == pixels[1] and pixels[2] == pixels[3] != pixels[0]


def test_missing_results_are_named(perfect: tuple[Path, Path], project: Path, tmp_path: Path) -> None:
    good, bad = perfect
    (good / "00001.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of .* 00001\.png"):
        compare(project / DATA, bad, good, str(project / "nano"), tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    words = ["--data", tmp_path / "nowhere", "--before", bad, "--after", good, "--output_dir", tmp_path]
    done = run_script("tools/compare_circles.py", *words, folder=tmp_path)
    assert done.code == 2 and "tools/fill_circles.py" in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_the_quickstart_teaches_the_edit(own_project: Path) -> None:
    """The shipped configuration with fewer steps already gets most colours right; the base gets none."""
    project = own_project
    done = run_script(
        "tools/fill_circles.py", "--output_dir", DATA, "--num_train", 400, "--num_test", 60, folder=project
    )
    assert done.code == 0, done.said
    config = ["--config_file", quickstart.CONFIG, "--output_dir", "output/taught"]
    succeeded(run_script("influx_cache.py", *config, folder=project))
    succeeded(run_script("influx_train.py", *config, "--max_train_steps", 500, folder=project))
    succeeded(run_script("influx_infer.py", *config, folder=project))
    base = ["--lora", "none", "--output", "output/taught/base"]
    succeeded(run_script("influx_infer.py", *config, *base, folder=project))
    output = project / "output" / "taught"
    found = compare(project / DATA, output / "base", output / "edited", str(project / "nano"), output)
    before, after = found["before"], found["after"]
    assert isinstance(before, dict) and isinstance(after, dict)
    assert before["both_colours_right"] < 0.1 and after["both_colours_right"] > 0.5
    assert after["psnr"] > before["psnr"] + 8
