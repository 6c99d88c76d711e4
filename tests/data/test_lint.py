"""Each warning on a pair made for it, and none on good pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config import load
from library.data import lint
from library.data.lint.duplicates import Look, check_duplicates
from tests.conftest import ROOT
from tests.data.test_lint_shift import texture

SIDE = 128
ABSENT_BASE = '[model]\npretrained_model_name_or_path = "nobody/has-this"'


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A colour picture with the spectrum of a photograph, its colours softer than its light."""
    side = max(width, height)
    light, *hues = (texture(3 * seed + part, side)[:height, :width] for part in range(3))
    channels = [light + 0.3 * (hues[0] - 128), light, light + 0.3 * (hues[1] - 128)]
    return Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))


def edited(source: Image.Image, box: tuple[int, int, int, int] = (40, 40, 88, 88)) -> Image.Image:
    """The picture with a red box in it: a good target."""
    target = source.copy()
    target.paste((220, 30, 30), box)
    return target


class Data:
    """A folder of pairs with masks and captions, and what --lint says about it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("source", "target", "mask"):
            (folder / name).mkdir()

    def add(
        self, name: str, source: Image.Image, target: Image.Image, mask=(32, 32, 96, 96), text: str = "red"
    ) -> None:
        """One item. mask: its white box."""
        source.save(self.folder / "source" / f"{name}.png")
        target.save(self.folder / "target" / f"{name}.png")
        drawn = Image.new("L", source.size, 0)
        drawn.paste(255, mask)
        drawn.save(self.folder / "mask" / f"{name}.png")
        (self.folder / "source" / f"{name}.txt").write_text(text, encoding="utf-8")

    def run(self, *arguments: str, subset: str = "", dataset: str = "", top: str = ""):
        """The loaded configuration."""
        file = self.folder / "run.toml"
        folders = 'image_dir = "source"\ntarget_dir = "target"\nmask_dir = "mask"\nmode = "edit"'
        parts = [
            ABSENT_BASE,
            top,
            '[cache]\ndataset_cache_dir = "cache"',
            f"[[datasets]]\nresolution = {SIDE}",
            dataset,
        ]
        file.write_text("\n".join([*parts, "[[datasets.subsets]]", folders, subset]), encoding="utf-8")
        return load(["--config_file", str(file), "--lint", *arguments], "cache")

    def findings(self, **tables: str) -> dict[str, list[str]]:
        """Kinds of findings by item."""
        report = self.folder / "report.json"
        assert lint.run(self.run("--lint_json", str(report), **tables)) == 0
        found: dict[str, list[str]] = {}
        for finding in json.loads(report.read_text(encoding="utf-8"))["findings"]:
            found.setdefault(finding["item"].rsplit("/", 1)[1], []).append(finding["kind"])
        return found


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Three good pairs."""
    made = Data(tmp_path)
    for number in range(3):
        made.add(f"good{number}", picture(number), edited(picture(number)))
    return made


def test_good_pairs_raise_no_warning(data, capsys) -> None:
    assert data.findings() == {}
    assert "3 items, nothing found" in capsys.readouterr().out
    assert lint.run(data.run("--strict")) == 0


def test_an_identical_pair_even_when_saved_again(data) -> None:
    data.add("same", picture(7), picture(7))
    data.add("jpeg", picture(8), picture(8))
    picture(8).save(data.folder / "target" / "jpeg.jpg", quality=75)
    (data.folder / "target" / "jpeg.png").unlink()
    assert data.findings() == {"same": ["identical"], "jpeg": ["identical"]}


def test_a_slight_change_of_all_colours_is_no_identical_pair(data) -> None:
    brighter = picture(7).point(lambda value: min(255, value + 9))
    data.add("graded", picture(7), brighter)
    assert data.findings() == {}


def test_a_shifted_pair(data) -> None:
    wide = picture(7, SIDE + 16, SIDE + 16)
    data.add("moved", wide.crop((8, 8, 136, 136)), edited(wide.crop((5, 10, 133, 138))), mask=(0, 0, 128, 120))
    assert data.findings() == {"moved": ["shifted"]}
    values = json.loads((data.folder / "report.json").read_text())["findings"][0]["values"]
    assert values["x"] == pytest.approx(3, abs=0.3) and values["y"] == pytest.approx(-2, abs=0.3)


def test_a_mask_that_misses_the_change(data) -> None:
    data.add("missed", picture(7), edited(picture(7)), mask=(96, 96, 128, 128))
    data.add("half", picture(8), edited(picture(8)), mask=(40, 40, 64, 88))
    data.add("tight", picture(9), edited(picture(9)), mask=(40, 40, 88, 88))
    assert data.findings() == {"missed": ["mask_misses_change"], "half": ["mask_misses_change"]}


def test_a_constant_mask(data) -> None:
    data.add("white", picture(7), edited(picture(7)), mask=(0, 0, 128, 128))
    tall = picture(8, SIDE, 2 * SIDE)
    data.add("cut", tall, edited(tall, (40, 104, 88, 152)), mask=(0, 0, 128, 24))  # black once its top is cropped away
    found = data.findings(dataset="enable_bucket = false")
    assert found == {"white": ["constant_mask"], "cut": ["constant_mask", "cropped"]}


def test_a_mask_painted_in_the_alpha_of_a_white_picture(data) -> None:
    data.add("alpha", picture(7), edited(picture(7)))
    painted = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (32, 32, 96, 96))
    painted.save(data.folder / "mask" / "alpha.png")
    assert data.findings(subset="mask_jitter = 4") == {"alpha": ["constant_mask"]}


def test_masks_that_were_asked_to_be_full_are_no_warning(data) -> None:
    assert data.findings(subset="full_mask_rate = 0.3") == {}


def test_an_extreme_crop_and_an_extreme_enlargement(data) -> None:
    data.add(
        "wide", picture(7, 2 * SIDE, SIDE), edited(picture(7, 2 * SIDE, SIDE), (100, 40, 160, 88)), (80, 16, 180, 112)
    )
    data.add("small", picture(8, 64, 64), edited(picture(8, 64, 64), (20, 20, 44, 44)), mask=(16, 16, 48, 48))
    data.add("low", picture(9, 64, 64), edited(picture(9)).resize((SIDE, SIDE)), mask=(16, 16, 48, 48))
    found = data.findings(dataset="enable_bucket = false")
    assert found["wide"] == ["cropped"] and found["small"] == ["enlarged"]
    assert "enlarged" in found["low"]  # the source has half the target's pixels


def test_duplicates_even_when_renamed_and_saved_again(data) -> None:
    data.add("copy", picture(0), edited(picture(0)), text="another caption")
    data.add("again", picture(0), edited(picture(0)))
    for role in ("source", "target"):
        path = data.folder / role / "again.png"
        Image.open(path).save(path.with_suffix(".jpg"), quality=85)
        path.unlink()
    assert data.findings() == {name: ["duplicate"] for name in ("good0", "copy", "again")}


def test_one_source_with_two_edits_is_no_duplicate(data) -> None:
    data.add("other", picture(0), edited(picture(0), (44, 44, 60, 60)))
    assert data.findings() == {}


def test_a_caption_that_is_cut_off(data) -> None:
    from tests.tiny import t5_tokenizer

    t5_tokenizer().save_pretrained(data.folder / "words")
    data.add("long", picture(7), edited(picture(7)), text="red circle " * 20 + "teal square")
    top = 't5_tokenizer = "words"'
    assert data.findings(top=top) == {}  # 512 tokens hold it
    report = data.folder / "short.json"
    lint.run(data.run("--lint_json", str(report), "--t5xxl_max_token_length", "16", top=top))
    (finding,) = json.loads(report.read_text())["findings"]
    assert finding["kind"] == "long_caption" and finding["values"]["lost"].endswith("teal square")


def test_joined_canvases_are_checked_as_pairs(tmp_path) -> None:
    (tmp_path / "joined").mkdir()
    for name, target in (("good", edited(picture(1))), ("same", picture(2))):
        canvas = Image.new("RGB", (2 * SIDE, SIDE))
        canvas.paste(picture(1 if name == "good" else 2), (0, 0))
        canvas.paste(target, (SIDE, 0))
        canvas.save(tmp_path / "joined" / f"{name}.png")
    file, report = tmp_path / "run.toml", tmp_path / "report.json"
    file.write_text(
        f'{ABSENT_BASE}\n[[datasets]]\nresolution = {SIDE}\n[[datasets.subsets]]\nimage_dir = "joined"\n'
        'mode = "spatial"\n'
        'instance_prompt = "red"'
    )
    lint.run(load(["--config_file", str(file), "--lint", "--lint_json", str(report)], "cache"))
    (finding,) = json.loads(report.read_text())["findings"]
    assert (finding["item"], finding["kind"]) == ("joined/same", "identical")


def test_strict_is_exit_code_1_and_the_terminal_says_what_to_do(data, capsys) -> None:
    data.add("same", picture(7), picture(7))
    assert lint.run(data.run()) == 0
    assert lint.run(data.run("--strict")) == 1
    printed = capsys.readouterr().out
    assert "4 items, 1 of them with warnings" in printed
    assert "identical: source and target are the same (1)" in printed and "source/same: " in printed
    assert lint.KINDS["identical"].advice in printed


def test_json_has_counts_numbers_and_files(data) -> None:
    data.add("same", picture(7), picture(7))
    data.findings()
    report = json.loads((data.folder / "report.json").read_text())
    assert (report["format"], report["version"], report["items"]) == ("influx-lint", 1, 4)
    assert report["counts"] == {kind: int(kind == "identical") for kind in lint.KINDS}
    (finding,) = report["findings"]
    assert finding["item"] == "source/same" and finding["values"] == {"mean": 0.0}
    assert finding["files"]["target"] == str(data.folder / "target" / "same.png")


def test_nothing_is_written_beside_the_report(data) -> None:
    before = sorted(data.folder.rglob("*"))
    lint.run(data.run())
    assert sorted(data.folder.rglob("*")) == sorted([*before, data.folder / "run.toml"])


def test_no_torch_and_no_base(data) -> None:
    """As a process of its own, in which torch cannot be imported."""
    data.run()
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from library.config import load\nfrom library.data.lint import run\n"
        f"sys.exit(run(load(['--config_file', {str(data.folder / 'run.toml')!r}, '--lint', '--strict'], 'cache')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stdout


def test_many_items_are_compared_by_their_files(monkeypatch) -> None:
    monkeypatch.setattr("library.data.lint.duplicates.MOST_COMPARED", 2)
    looks = [Look("edit", name, bytes(3072)) for name in ("a", "b", "a")]
    found = list(check_duplicates(["0", "1", "2"], looks))
    assert [(finding.item, finding.values["others"]) for finding in found] == [("0", ["2"]), ("2", ["0"])]
