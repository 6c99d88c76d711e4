"""Every source gives the same items: folders, suffixes, JSON Lines, CSV, the seed's spelling, Hugging Face."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config import load
from library.data.ledger import Ledger
from library.data.pictures import pictures_of
from library.data.plan import Plan, make_plan
from library.data.recipe import ImageEncoding
from library.errors import UserError
from tests.caching.conftest import EDIT, picture, write_pairs


def plan(folder: Path, subset: str, *arguments: str, dataset: str = "") -> Plan:
    path = folder / "run.toml"
    path.write_text(
        '[model]\npretrained_model_name_or_path = "none"\n[[datasets]]\nresolution = 64\nbucket_reso_steps = 16\n'
        + dataset
        + "".join(f"\n[[datasets.subsets]]\n{one}" for one in subset.split("---"))
    )
    run = load(["--config_file", str(path), *arguments], "cache")
    ledger = Ledger(folder / "files.json")
    return make_plan(run.datasets, run.cache, ImageEncoding("vae"), ledger, seed=run.training.seed or 0)


def contents(made: Plan) -> list[tuple]:
    """Fingerprints and captions, which depend on the bytes of the files and not on where they lie."""
    return sorted((recipe.fingerprint, item.captions) for item in made.items for recipe in item.recipes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data")


def rows(data: Path) -> list[dict[str, str]]:
    return [
        {
            "image": f"train_A/{number}.png",
            "target": f"train_B/{number}.png",
            "caption": (data / "prompts" / f"{number}.txt").read_text(),
        }
        for number in range(4)
    ]


def test_suffixes_json_lines_and_csv_give_what_folders_give(data: Path, tmp_path: Path) -> None:
    expected = contents(plan(tmp_path, EDIT))
    (data / "one").mkdir()
    for number in range(4):
        (data / "one" / f"{number}_source.png").write_bytes((data / "train_A" / f"{number}.png").read_bytes())
        (data / "one" / f"{number}_target.png").write_bytes((data / "train_B" / f"{number}.png").read_bytes())
        (data / "one" / f"{number}.txt").write_bytes((data / "prompts" / f"{number}.txt").read_bytes())
    suffixes = 'image_dir = "data/one"\nsource_suffix = "_source"\ntarget_suffix = "_target"\nmode = "edit"'
    assert contents(plan(tmp_path, suffixes)) == expected
    (data / "items.jsonl").write_text("\n".join(json.dumps(row) for row in rows(data)))
    assert contents(plan(tmp_path, 'metadata_file = "data/items.jsonl"\nmode = "edit"')) == expected
    with open(data / "items.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "target", "caption"])
        writer.writeheader()
        writer.writerows(rows(data))
    assert contents(plan(tmp_path, 'metadata_file = "data/items.csv"\nmode = "edit"')) == expected


def test_a_table_is_completed_by_folders_and_caption_files(data: Path, tmp_path: Path) -> None:
    """What has no column is looked for where the keys say, by the image's name."""
    expected = contents(plan(tmp_path, EDIT))
    masked = contents(plan(tmp_path, EDIT + 'mask_dir = "data/masks"'))
    (data / "items.jsonl").write_text("\n".join(json.dumps({"image": row["image"]}) for row in rows(data)))
    table = 'metadata_file = "data/items.jsonl"\nmode = "edit"\ntarget_dir = "data/train_B"\n'
    assert contents(plan(tmp_path, table + 'caption_dir = "data/prompts"')) == expected
    assert contents(plan(tmp_path, table + 'caption_dir = "data/prompts"\nmask_dir = "data/masks"')) == masked
    for number in range(4):
        (data / "prompts" / f"{number}.txt").rename(data / "train_A" / f"{number}.txt")
    assert contents(plan(tmp_path, table)) == expected


def test_files_of_one_name_in_two_folders_are_not_mistaken(data: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{folder}/0.png"} for folder in ("train_A", "train_B")]
    (data / "items.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    table = 'metadata_file = "data/items.jsonl"\nmode = "mask"\ncaption_dir = "data/prompts"\nmask_dir = "data/masks"'
    with pytest.raises(UserError) as error:
        plan(tmp_path, table)
    assert str(error.value).count("has no mask") == str(error.value).count("has no caption") == 2
    for folder, mask, caption in (("train_A", 1, "one"), ("train_B", 2, "two")):
        for place in ("masks", "prompts"):
            (data / place / folder).mkdir()
        (data / "masks" / folder / "0.png").write_bytes((data / "masks" / f"{mask}.png").read_bytes())
        (data / "prompts" / folder / "0.txt").write_text(caption)
    made = plan(tmp_path, table + "\nrecursive = true")
    assert [item.captions for item in made.items] == [("one",), ("two",)]
    assert [Path(item.first.pair.mask.blob.key).parent.name for item in made.items] == ["train_A", "train_B"]


def test_columns_that_nothing_reads_are_said(data: Path, tmp_path: Path) -> None:
    (data / "items.jsonl").write_text("\n".join(json.dumps({**row, "author": "me"}) for row in rows(data)))
    made = plan(tmp_path, 'metadata_file = "data/items.jsonl"\nmode = "edit"\ncaption_dir = "data/prompts"')
    assert "items.jsonl: columns that nothing reads: author" in made.notices
    assert any(notice.startswith("caption_dir does nothing here: items.jsonl") for notice in made.notices)


def test_the_seeds_spelling(data: Path, tmp_path: Path) -> None:
    expected = contents(plan(tmp_path, EDIT))
    seed = (
        'instance_data_dir = "data/train_A"\ntarget_data_dir = "data/train_B"\ncaption_data_dir = "data/prompts"\n'
        'mode = "edit"\nrepeats = 3'
    )
    assert contents(plan(tmp_path, seed)) == expected
    several = plan(tmp_path, EDIT, "--size", "32,64")
    assert [len(item.sizes) for item in several.items] == [2] * 4
    assert {recipe.size for item in several.items for recipe in item.recipes} == {(32, 32), (64, 64)}
    flipped = plan(tmp_path, EDIT + "random_flip = true")
    assert [len(item.sizes[0]) for item in flipped.items] == [2] * 4


def test_masks_and_sources_in_one_folder(data: Path, tmp_path: Path) -> None:
    for number in range(4):
        (data / "train_A" / f"{number}-masklabel.png").write_bytes((data / "masks" / f"{number}.png").read_bytes())
    subset = 'image_dir = "data/train_A"\nmode = "mask"\ncaption_dir = "data/prompts"\n'
    apart = plan(tmp_path, subset + 'mask_suffix = "-masklabel"')
    assert len(apart.items) == 4
    for path in (data / "train_A").glob("*-masklabel.png"):
        path.unlink()
    assert contents(apart) == contents(plan(tmp_path, subset + 'mask_dir = "data/masks"'))


def test_modes_mix_in_one_run(data: Path, tmp_path: Path) -> None:
    spatial = EDIT.replace('"edit"', '"spatial"')
    mask = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    made = plan(tmp_path, f"{EDIT}---{spatial}---{mask}")
    assert made.subset_names == ("train_A", "train_A-2", "train_A-3")
    assert sorted(recipe.size for item in made.items for recipe in item.recipes) == [(64, 64)] * 8 + [(128, 64)] * 4


def test_instance_prompt_is_a_fallback_never_an_override(data: Path, tmp_path: Path) -> None:
    (data / "prompts" / "2.txt").unlink()
    made = plan(tmp_path, EDIT + 'instance_prompt = "fallback"')
    assert [item.captions[0] for item in made.items] == [
        "red circle number 0", "red circle number 1", "fallback", "red circle number 0",
    ]  # fmt: skip


def test_captions_in_lines_and_lists_are_variants(data: Path, tmp_path: Path) -> None:
    (data / "prompts" / "0.txt").write_text("one\n\ntwo\nthree\n")
    made = plan(tmp_path, EDIT + "caption_per_line = true")
    assert made.items[0].captions == ("one", "two", "three") and len(made.items[1].captions) == 1
    row = {**rows(data)[0], "caption": ["four", "five"]}
    (data / "items.jsonl").write_text(json.dumps(row))
    assert plan(tmp_path, 'metadata_file = "data/items.jsonl"\nmode = "edit"').items[0].captions == ("four", "five")


def test_shuffled_captions_are_variants_with_fixed_ends(data: Path, tmp_path: Path) -> None:
    (data / "prompts" / "0.txt").write_text("first, a, b, c, d, e")
    settings = (
        'shuffle_caption = true\ncaption_variants = 5\nkeep_tokens = 1\ncaption_prefix = "pre"\ncaption_suffix = "end"'
    )
    made = plan(tmp_path, EDIT + settings)
    captions = made.items[0].captions
    assert len(set(captions)) == 5
    for caption in captions:
        assert caption.startswith("pre first, ") and caption.endswith(" end")
        assert sorted(caption.removeprefix("pre ").removesuffix(" end").split(", ")[1:]) == list("abcde")
    assert plan(tmp_path, EDIT + settings).items[0].captions == captions
    assert plan(tmp_path, EDIT + settings, "--seed", "3").items[0].captions != captions


def test_crops_and_generated_masks_are_cached_variants(data: Path, tmp_path: Path) -> None:
    picture(0, 128, 64).save(data / "train_A" / "0.png")
    picture(1, 128, 64).save(data / "train_B" / "0.png")
    crops = plan(tmp_path, EDIT + "random_crop = true\ncrop_variants = 3", dataset="enable_bucket = false")
    boxes = {recipe.geometry.box for recipe in crops.items[0].recipes}
    assert len(boxes) == 3 and all(box[2] - box[0] == pytest.approx(0.5) for box in boxes)
    mask = 'image_dir = "data/train_A"\ninstance_prompt = "red"\nmode = "mask"\ngenerate_mask = ["box", "brush"]\n'
    drawn = plan(tmp_path, mask + "mask_variants = 4\nfull_mask_rate = 0.1")
    assert drawn.items[0].first.num_masks == 5


def test_repeated_images_in_a_table_are_items_of_their_own(data: Path, tmp_path: Path) -> None:
    lines = [{**rows(data)[0], "target": f"train_B/{number}.png"} for number in range(3)]
    (data / "items.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    made = plan(tmp_path, 'metadata_file = "data/items.jsonl"\nmode = "edit"')
    assert len({item.key for item in made.items}) == len({item.first.fingerprint for item in made.items}) == 3


@pytest.fixture
def parquet(data: Path, tmp_path: Path, monkeypatch) -> Path:
    """The same pairs as a parquet file with images inside."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    columns = {
        "before": [str(data / row["image"]) for row in rows(data)],
        "after": [str(data / row["target"]) for row in rows(data)],
        "words": [row["caption"] for row in rows(data)],
    }
    made = datasets.Dataset.from_dict(columns)
    for column in ("before", "after"):
        made = made.cast_column(column, datasets.Image())
    (tmp_path / "hub").mkdir()
    made.to_parquet(tmp_path / "hub" / "train.parquet")
    return tmp_path / "hub"


HUB = 'image_column = "before"\ntarget_column = "after"\ncaption_column = "words"\nmode = "edit"\n'


@pytest.mark.parametrize("name", ["hub", "hub/train.parquet"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_hugging_face_data_sets_give_what_folders_give(name, streaming, parquet, tmp_path) -> None:
    subset = f'dataset_name = "{tmp_path / name}"\ndataset_streaming = {streaming}\n{HUB}'
    assert contents(plan(tmp_path, subset)) == contents(plan(tmp_path, EDIT))


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("splits", ["one", "several"])
def test_folders_of_save_to_disk_are_read(splits, streaming, parquet, tmp_path) -> None:
    """Rows are mapped from the disk, so streaming them is no error and changes nothing; a warning says so."""
    datasets = pytest.importorskip("datasets")
    saved = datasets.load_dataset(str(parquet), split="train")
    if splits == "several":
        saved = datasets.DatasetDict(train=saved, test=saved.select([0]))
    saved.save_to_disk(str(tmp_path / "saved"))
    subset = f'dataset_name = "{tmp_path / "saved"}"\ndataset_streaming = {streaming}\n{HUB}'
    expected = contents(plan(tmp_path, EDIT))
    assert contents(plan(tmp_path, subset)) == expected
    warnings = load(["--config_file", str(tmp_path / "run.toml")], "cache").warnings
    assert any("dataset_streaming does nothing here" in one for one in warnings) == (streaming == "true")
    if splits == "several":
        subset = subset.replace("mode", 'dataset_split = "test"\nmode')
        assert len(plan(tmp_path, subset).items) == 1
        with pytest.raises(UserError, match="dataset_split = nowhere"):
            plan(tmp_path, subset.replace('"test"', '"nowhere"'))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"before": "befor"}, "no column befor; there are: before, after, words"),
        ({"words": "text"}, "no column text"),
        ({"mode": 'dataset_split = "test"\nmode'}, "test"),
    ],
)
def test_what_is_wrong_with_a_hugging_face_data_set_is_said(change, reason, parquet, tmp_path) -> None:
    subset = f'dataset_name = "{parquet}"\n{HUB}'
    for old, new in change.items():
        subset = subset.replace(f'"{old}"', f'"{new}"') if old != "mode" else subset.replace("mode", new)
    with pytest.raises(UserError, match=reason):
        plan(tmp_path, subset)


def test_masks_with_alpha_and_of_one_value_are_said(data: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 255).save(data / "masks" / "0.png")
    mask = Image.open(data / "masks" / "1.png").convert("RGBA")
    mask.save(data / "masks" / "1.png")
    subset = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    said = " ".join(plan(tmp_path, subset).notices)
    assert "masks/0.png: a mask of one value" in said and "masks/1.png: a mask with an alpha channel" in said


def test_the_alpha_channel_as_mask_keeps_the_colours_under_it(data: Path, tmp_path: Path) -> None:
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    for number in range(4):
        Image.merge("RGBA", (*picture(number).split(), alpha)).save(data / "train_A" / f"{number}.png")
    subset = 'image_dir = "data/train_A"\nalpha_mask = true\ninstance_prompt = "red"\nmode = "mask"'
    made = pictures_of(plan(tmp_path, subset).items[1].first)
    assert np.array_equal(np.asarray(made.source), np.asarray(picture(1)))
    assert made.masks[0][:, :32].all() and not made.masks[0][:, 32:].any()
