"""Whatever is wrong with a data set is said at once, by name, before a model is loaded; skip_bad goes on without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from library.config import load
from library.data.ledger import Ledger
from library.data.plan import Plan, make_plan
from library.data.recipe import ImageEncoding
from library.errors import ConfigError, DataError, UserError
from tests.caching.conftest import EDIT, picture, write_pairs

MASKED = 'image_dir = "data/train_A"\ncaption_dir = "data/prompts"\nmode = "mask"\nmask_dir = "data/masks"\n'
SPATIAL = EDIT.replace('"edit"', '"spatial"')
JSONL = 'metadata_file = "data/items.jsonl"\nmode = "edit"\ninstance_prompt = "red"\n'
MASK_TABLE = 'metadata_file = "data/items.jsonl"\nmode = "mask"\ngenerate_mask = ["box"]\ninstance_prompt = "red"\n'
CSV = JSONL.replace(".jsonl", ".csv")


def planned(folder: Path, subset: str, *arguments: str) -> Plan:
    """The plan of one subset; no model is anywhere near."""
    path = folder / "run.toml"
    path.write_text(
        '[model]\npretrained_model_name_or_path = "none"\n[[datasets]]\nresolution = 64\nbucket_reso_steps = 16\n'
        f"[[datasets.subsets]]\n{subset}"
    )
    run = load(["--config_file", str(path), *arguments], "cache")
    return make_plan(run.datasets, run.cache, ImageEncoding("vae"), Ledger(folder / "files.json"))


@dataclass(frozen=True)
class Case:
    """A data set of four good pairs, spoilt. names: what the report must name. kept: items left with skip_bad."""

    spoil: Callable[[Path], object]
    reason: str
    subset: str = EDIT
    names: tuple[str, ...] = field(default=("1",))
    kept: int = 3


def text(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda data: (data / name).write_bytes(content)


def image(name: str, made: Image.Image, **options) -> Callable[[Path], object]:
    return lambda data: made.save(data / name, **options)


def removed(*names: str) -> Callable[[Path], object]:
    return lambda data: [(data / name).unlink() for name in names]


def rotated(data: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, 64, 32).save(data / "train_A" / "1.png", exif=exif)
    picture(1, 64, 32).save(data / "train_B" / "1.png")


def cut(name: str, share: float) -> Callable[[Path], object]:
    def spoil(data: Path) -> None:
        content = (data / name).read_bytes()
        (data / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def flipped_byte(data: Path) -> None:
    path = data / "train_B" / "1.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda data: [spoil(data) for spoil in spoils]


def rows(name: str, *lines: str) -> Callable[[Path], object]:
    good = {
        "items.jsonl": ['{"image": "train_A/0.png", "target": "train_B/0.png"}'],
        "items.csv": ["image,target,caption", "train_A/0.png,train_B/0.png,red"],
    }[name]
    return text(name, "\n".join([*good, *lines]).encode())


GREY = Image.new("L", (64, 64), 0)
CASES = {
    "missing target": Case(removed("train_B/1.png"), "has no target"),
    "missing caption": Case(removed("prompts/1.txt"), "has no caption"),
    "missing mask": Case(removed("masks/1.png"), "has no mask", MASKED),
    "two missing": Case(removed("train_B/1.png", "prompts/2.txt"), "has no", names=("1.png", "2.png"), kept=2),
    "empty image": Case(text("train_A/1.png", b""), "an empty file"),
    "text as image": Case(text("train_A/1.png", b"hello"), "not an image"),
    "web page as image": Case(text("train_A/1.png", b"<html>404</html>"), "web page"),
    "postscript as image": Case(text("train_A/1.png", b"%!PS-Adobe-3.0\n"), "PostScript"),
    "cut png": Case(cut("train_A/1.png", 0.6), "damaged"),
    "cut target": Case(cut("train_B/1.png", 0.9), "train_B/1.png: damaged"),
    "flipped byte": Case(flipped_byte, "damaged"),
    "cut jpeg": Case(
        both(removed("train_A/1.png"), image("train_A/1.jpg", picture(1)), cut("train_A/1.jpg", 0.5)), "damaged"
    ),
    "float tiff": Case(both(removed("train_A/1.png"), image("train_A/1.tif", Image.new("F", (64, 64)))), "not known"),
    "too small": Case(image("train_A/1.png", picture(1, 8, 8)), "only 8x8"),
    "another aspect": Case(image("train_B/1.png", picture(1, 64, 32)), "another aspect"),
    "three rows cropped away": Case(
        both(image("train_A/1.png", picture(1, 400, 400)), image("train_B/1.png", picture(1, 400, 397))),
        'is 400x397: another aspect (size_mismatch = "crop" or "pad"',
    ),
    "a mask that lost three rows": Case(
        both(image("train_A/1.png", picture(1, 400, 400)), image("masks/1.png", GREY.resize((400, 397)))),
        "is 400x397", MASKED,
    ),
    "rotated by exif against its target": Case(rotated, "another aspect"),
    "spatial with another aspect": Case(image("train_B/1.png", picture(1, 32, 64)), "another aspect", SPATIAL),
    "mask of another aspect": Case(image("masks/1.png", GREY.resize((64, 32))), "is 64x32", MASKED),
    "black mask": Case(image("masks/1.png", GREY), "all black", MASKED),
    "white mask, inverted": Case(
        image("masks/1.png", Image.new("L", (64, 64), 255)), "all white", MASKED + "invert_mask = true"
    ),
    "cut mask": Case(cut("masks/1.png", 0.5), "masks/1.png: damaged", MASKED),
    "alpha without transparency": Case(
        lambda data: [
            Image.merge("RGBA", (*picture(n).split(), Image.new("L", (64, 64), 255 if n == 1 else 99))).save(
                data / "train_A" / f"{n}.png"
            )
            for n in range(4)
        ],
        "no transparent parts",
        MASKED.replace('mask_dir = "data/masks"', "alpha_mask = true"),
    ),
    "two images of one name": Case(image("train_A/1.jpg", picture(1)), "2 images of one name"),
    "two targets of one name": Case(image("train_B/1.jpg", picture(1)), "2 images of one name"),
    "empty caption": Case(text("prompts/1.txt", b""), "caption is empty"),
    "blank caption": Case(text("prompts/1.txt", b" \n\t "), "caption is empty"),
    "utf-16 caption": Case(text("prompts/1.txt", "rød".encode("utf-16")), "UTF-16"),
    "latin-1 caption": Case(text("prompts/1.txt", "rød".encode("latin-1")), "not UTF-8"),
    "long caption": Case(text("prompts/1.txt", b"red " * 30_000), "no caption"),
    "control characters": Case(text("prompts/1.txt", b"red\x00circle"), "control character"),
    "no image folder": Case(lambda data: None, "no such file or", EDIT.replace("train_A", "nowhere"), ("nowh",), 0),
    "no target folder": Case(lambda data: None, "no such file or", EDIT.replace("train_B", "nowhere"), ("nowh",), 0),
    "no caption folder": Case(lambda data: None, "caption_dir", EDIT.replace("prompts", "nowhere"), ("nowhere",), 0),
    "a file as folder": Case(text("f", b""), "not a folder", EDIT.replace("train_A", "f"), ("f",), 0),
    "empty folder": Case(lambda data: (data / "e").mkdir(), "no images", EDIT.replace("train_A", "e"), ("e",), 0),
    "no such suffix": Case(lambda data: None, "ends in _src", EDIT + 'source_suffix = "_src"', ("train_A",), 0),
    "edit without targets": Case(
        lambda data: None, "needs targets", EDIT.replace('target_dir = "data/train_B"', ""), ("mode = edit",), 0
    ),
    "mask without masks": Case(
        lambda data: None, "needs masks", MASKED.replace('mask_dir = "data/masks"', ""), ("mode = mask",), 0
    ),
    "two origins of masks": Case(lambda data: None, "keep one", MASKED + 'generate_mask = ["box"]', ("train_A",), 4),
    "masks in spatial": Case(lambda data: None, "cannot act", SPATIAL + 'mask_dir = "data/masks"', ("train_A",), 4),
    "no table": Case(lambda data: None, "no such file", JSONL, ("items.jsonl",), 0),
    "empty table": Case(text("items.jsonl", b"\n"), "lists no items", JSONL, ("items.jsonl",), 0),
    "table not utf-8": Case(text("items.jsonl", b"\xff\xfa"), "not UTF-8", JSONL, ("items.jsonl",), 0),
    "not json": Case(rows("items.jsonl", "{image: 1}"), "is not JSON", JSONL, ("line 2",), 1),
    "not an object": Case(rows("items.jsonl", "[1]"), "not a JSON object", JSONL, ("line 2",), 1),
    "no image column": Case(rows("items.jsonl", '{"picture": "x"}'), "column image", JSONL, ("line 2",), 1),
    "number as path": Case(rows("items.jsonl", '{"image": "a", "target": 3}'), "not a path", JSONL, ("line 2",), 1),
    "row of a lost file": Case(
        rows("items.jsonl", '{"image": "9.png", "target": "train_B/0.png"}'), "does not exist", JSONL, ("9.png",), 1
    ),
    "row without target": Case(
        rows("items.jsonl", '{"image": "train_A/1.png"}'), "has no target", JSONL, ("1.png",), 1
    ),
    "caption is no text": Case(
        rows("items.jsonl", '{"image": "train_A/1.png", "target": "train_B/1.png", "caption": [1]}'),
        "neither a text nor a list", JSONL, ("line 2",), 1,
    ),
    "no caption column": Case(
        rows("items.jsonl"), "no column words", JSONL + 'caption_column = "words"', ("line 1",), 0
    ),
    "a target in some rows": Case(
        rows("items.jsonl", '{"image": "train_A/1.png"}'), "no value in the column target", MASK_TABLE, ("line 2",), 1
    ),
    "an empty target in csv": Case(
        rows("items.csv", "train_A/1.png,,red"), "no value in the column target",
        MASK_TABLE.replace(".jsonl", ".csv"), ("line 3",), 1,
    ),
    "a mask in some rows": Case(
        text(
            "items.jsonl",
            b'{"image": "train_A/0.png", "target": "train_B/0.png", "mask": "masks/0.png"}\n'
            b'{"image": "train_A/1.png", "target": "train_B/1.png", "mask": null}',
        ),
        "no value in the column mask", JSONL, ("line 2",), 1,
    ),
    "a misspelt column": Case(
        text("items.csv", b"image,targt\ntrain_A/0.png,train_B/0.png"), "Did you mean target?",
        MASK_TABLE.replace(".jsonl", ".csv"), ("items.csv", "targt"), 1,
    ),
    "no column of images": Case(
        text("items.csv", b"picture,target\ntrain_A/0.png,train_B/0.png"), "no column image; there are: picture, target",
        CSV, ("items.csv",), 0,
    ),
    "a column of masks and generated masks": Case(
        text("items.jsonl", b'{"image": "train_A/0.png", "mask": "masks/0.png"}'), "keep one",
        MASK_TABLE, ("items.jsonl",), 1,
    ),
    "short csv row": Case(rows("items.csv", "train_A/1.png"), "another number of columns", CSV, ("line 3",), 1),
    "csv of one line": Case(text("items.csv", b"image,target\n"), "lists no items", CSV, ("items.csv",), 0),
    "open quote in csv": Case(rows("items.csv", 'train_A/1.png,"x'), "is not CSV", CSV, ("items.csv",), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_reported_by_name_and_can_be_skipped(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.spoil(write_pairs(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        planned(tmp_path, case.subset)
    message = str(error.value)
    assert case.reason in message and all(part in message for part in case.names), message
    if isinstance(error.value, ConfigError):
        return  # a key that names nothing cannot be skipped
    assert "skip_bad" in message
    if case.kept:
        plan = planned(tmp_path, case.subset, "--skip_bad")
        assert len(plan.items) == case.kept and any("skip_bad" in notice for notice in plan.notices)
    else:
        with pytest.raises(DataError, match="no item is left"):
            planned(tmp_path, case.subset, "--skip_bad")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


def test_all_that_is_wrong_is_one_report(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", 8)
    removed("train_B/0.png", "prompts/1.txt")(data)
    text("train_A/2.png", b"x")(data)
    cut("train_B/3.png", 0.5)(data)
    text("prompts/4.txt", b"")(data)
    with pytest.raises(DataError) as error:
        planned(tmp_path, EDIT)
    message = str(error.value)
    assert message.startswith("5 things that cannot be used")
    assert all(f"{number}." in message for number in range(5))


def test_too_large_an_image_is_known_from_its_header(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    with pytest.raises(DataError, match="4 things|8 things"):
        planned(tmp_path, EDIT, "--max_image_pixels", "4095")


def test_strays_are_ignored_and_said(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (data / "train_A" / name).write_bytes(b"x")
    (data / "train_A" / "folder.png").mkdir()
    (data / "train_A" / "dangling.png").symlink_to(data / "nowhere")
    os.mkfifo(data / "train_A" / "pipe.png")
    picture(9).save(data / "train_B" / "lonely.png")
    plan = planned(tmp_path, EDIT)
    assert len(plan.items) == 4
    said = " ".join(plan.notices)
    assert "Thumbs.db" in said and "6 that are no images" in said and "lonely" in said


@pytest.mark.parametrize(
    "name",
    ["déjà-vu", "deja\u0301", "🎨", "a b", " lead", "-rf", "%s%d", "it's", 'quo"te', "new\nline", "x" * 240, "con"],
)
def test_names_of_every_kind_work(name: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data")
    for folder in ("train_A", "train_B"):
        (data / folder / "1.png").rename(data / folder / f"{name}.png")
    (data / "prompts" / "1.txt").rename(data / "prompts" / f"{name}.txt")
    assert f"train_A/{name}" in [item.key for item in planned(tmp_path, EDIT).items]
    (data / "train_B" / f"{name}.png").unlink()
    with pytest.raises(DataError) as error:
        planned(tmp_path, EDIT)
    assert "\n" not in str(error.value).split(": has no target")[0].split("  ", 1)[1]


def test_a_name_that_is_no_unicode_works(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data")
    for folder, ending in (("train_A", ".png"), ("train_B", ".png"), ("prompts", ".txt")):
        os.rename(os.fsencode(data / folder / f"1{ending}"), os.fsencode(data / folder) + b"/\xff" + ending.encode())
    assert len(planned(tmp_path, EDIT).items) == 4
    os.unlink(os.fsencode(data / "train_B") + b"/\xff.png")
    with pytest.raises(DataError) as error:
        planned(tmp_path, EDIT)
    str(error.value).encode("utf-8")
