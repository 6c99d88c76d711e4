"""The real archive's preparation: five folders of equal stems, the prefix, and one plain message for each defect."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tools import fill_circles
from tools.prepare_fill50k import PrepareError, prepare


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three pairs in ControlNet's layout."""
    root = tmp_path / "fill50k"
    lines = []
    for name in ("source", "target"):
        (root / name).mkdir(parents=True)
    for circle in fill_circles.training_items(3, 64, 64, 0):
        fill_circles.draw_outline(circle).save(root / "source" / f"{circle.stem}.png")
        fill_circles.draw_target(circle).save(root / "target" / f"{circle.stem}.png")
        names = {part: f"{part}/{circle.stem}.png" for part in ("source", "target")}
        lines.append(json.dumps({**names, "prompt": circle.prompt}))
    (root / "prompt.json").write_text("\n".join(lines) + "\n")
    return root


def test_folders_and_prefix(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    assert prepare(archive, output, prefix="FILL:", size=32) == 3
    for name in ("train_A", "train_B", "train_combined", "prompts", "prompts_combined"):
        assert sorted(path.stem for path in (output / name).iterdir()) == ["00000", "00001", "00002"]
    caption = (output / "prompts" / "00000.txt").read_text()
    assert (output / "prompts_combined" / "00000.txt").read_text() == f"FILL: {caption}"
    assert Image.open(output / "train_combined" / "00000.png").size == (64, 32)


def add_line(archive: Path, text: str) -> None:
    with (archive / "prompt.json").open("a") as file:
        file.write(text + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 4 is no JSON"),
        ('{"source": "source/1.png", "prompt": "x"}', "line 4 lacks the text 'target'"),
        (
            '{"source": "source/9.png", "target": "target/9.png", "prompt": "x"}',
            r"9\.png does not exist \(JSON line 4\)",
        ),
        ('{"source": "source/00000.png", "target": "target/00000.png", "prompt": "x"}', "lines 1 and 4 have the same"),
        ("[1]", "line 4 lacks the text 'source'"),
    ],
)
def test_defects_are_named_with_their_line(archive: Path, tmp_path: Path, line: str, message: str) -> None:
    add_line(archive, line)
    with pytest.raises(PrepareError, match=message):
        prepare(archive, tmp_path / "data")


def test_corrupt_unequal_and_missing(archive: Path, tmp_path: Path) -> None:
    (archive / "target" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(PrepareError, match=r"00001\.png is no readable image"):
        prepare(archive, tmp_path / "data")
    Image.new("RGB", (32, 32)).save(archive / "target" / "00001.png")
    with pytest.raises(PrepareError, match=r"\(64, 64\).*\(32, 32\)"):
        prepare(archive, tmp_path / "data")
    with pytest.raises(PrepareError, match="unpack the archive"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
