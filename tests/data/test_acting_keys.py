"""No key of a data set is silently useless: in every mode and from every source it acts, or it is said not to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.config import load
from library.config.run import Run
from library.config.tables import DatasetTable, SubsetTable
from library.data.cached import use_of
from library.data.ledger import Ledger
from library.data.plan import Plan, all_subsets, make_plan
from library.data.recipe import ImageEncoding
from library.data.shares import shares, trained_counts
from library.errors import UserError
from tests.caching.conftest import EDIT, picture, write_pairs

PICTURES = 'image_dir = "data/train_A"\ncaption_dir = "data/prompts"\nmode = "mask"\n'
TABLE = 'metadata_file = "data/items.jsonl"\nmode = "edit"\n'
SCENARIOS = {
    "edit": EDIT,
    "edit in regions": EDIT + 'mask_dir = "data/masks"\n',
    "edit held out": EDIT + "is_validation = true\n---" + EDIT,
    "edit by suffixes": 'image_dir = "data/one"\nsource_suffix = "_s"\n'
    'target_suffix = "_t"\nmode = "edit"\n',
    "mask": PICTURES + 'mask_dir = "data/masks"\n',
    "mask with targets": PICTURES + 'mask_dir = "data/masks"\ntarget_dir = "data/train_B"\n',
    "generated masks": PICTURES + 'generate_mask = ["box"]\n',
    "masks from alpha": PICTURES + "alpha_mask = true\n",
    "spatial": EDIT.replace('"edit"', '"spatial"'),
    "joined": 'image_dir = "data/joined"\ncaption_dir = "data/prompts"\nmode = "spatial"\n',
    "edit by a table": TABLE,
    "edit in regions by a table": TABLE.replace("items", "masked"),
    "a data set": 'dataset_name = "data/rows.parquet"\ntarget_column = "target"\ncaption_column = "caption"\n'
    'mode = "edit"\n',
}
KEYS = {
    "caption_dir": '"data/other_prompts"', "recursive": "true", "source_suffix": '"_s"', "target_suffix": '"_t"',
    "mask_suffix": '"_m"', "dataset_config_name": '"default"', "dataset_split": '"test"',
    "dataset_revision": '"main"', "image_column": '"picture"', "target_column": '"after"', "mask_column": '"m"',
    "caption_column": '"words"', "num_repeats": "3", "subset_weight": "2.0", "caption_extension": '".caption"',
    "caption_per_line": "true", "caption_prefix": '"a"', "caption_suffix": '"b"', "caption_separator": '";"',
    "shuffle_caption": "true\ncaption_variants = 3", "caption_variants": "3", "keep_tokens": "1",
    "caption_dropout_rate": "0.5", "caption_dropout_every_n_epochs": "2",
    "caption_tag_dropout_rate": "0.5\ncaption_variants = 3", "flip_aug": "true",
    "random_crop": "true\ncrop_variants = 2", "crop_variants": "2", "background_color": '"#ff0000"', "resize_interpolation": '"nearest"', "alpha_mask": "true",
    "generate_mask": '["half"]', "mask_variants": "3", "full_mask_rate": "0.5", "mask_dilation": "2",
    "mask_jitter": "2", "invert_mask": "true", "mask_only_right": "true", "edit_mask_value": "0.5",
    "min_bucket_reso": "128", "max_bucket_reso": "128", "bucket_reso_steps": "48", "bucket_no_upscale": "true",
}  # fmt: skip
NOT_HERE = {
    "image_dir", "target_dir", "mask_dir", "mode", "metadata_file", "dataset_name", "is_reg", "is_validation",
    "instance_prompt", "allow_empty_captions", "size_mismatch", "dataset_streaming",
    "resolution", "resolutions", "enable_bucket", "train_batch_size", "validation_split", "validation_seed", "subsets",
}  # fmt: skip
"""Sources and what a subset is; keys that act on spoilt data (test_bad_input.py) or on how it is read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs of every make-up: transparent parts, wide pictures, several tags and lines."""
    folder = tmp_path_factory.mktemp("keys")
    data = write_pairs(folder / "data", 3, 96, 64)
    for name in ("one", "joined", "other_prompts"):
        (data / name).mkdir()
    for number in range(3):
        alpha = Image.new("L", (96, 64), 255)
        alpha.paste(0, (8, 8, 30, 30))
        source = picture(number, 96, 64)
        source.putalpha(alpha)
        source.save(data / "train_A" / f"{number}.png")
        source.save(data / "one" / f"{number}_s.png")
        picture(100 + number, 96, 64).save(data / "one" / f"{number}_t.png")
        joined = Image.new("RGBA", (192, 64))
        joined.paste(source, (0, 0))
        joined.paste(picture(100 + number, 96, 64), (96, 0))
        joined.save(data / "joined" / f"{number}.png")
        (data / "prompts" / f"{number}.txt").write_text(f"red, circle, number {number}\nanother, line, here")
        (data / "one" / f"{number}.txt").write_text("red, circle, of suffixes\nanother, line, here")
        (data / "other_prompts" / f"{number}.txt").write_text("something else")
    for place in ("train_A", "train_B", "masks", "prompts", "joined", "one"):
        (data / place / "below").mkdir()
    for place, name in (("train_A", "9.png"), ("train_B", "9.png"), ("masks", "9.png"), ("joined", "9.png")):
        source = data / place / name.replace("9", "1")
        (data / place / "below" / name).write_bytes(source.read_bytes())
    for ending in ("s", "t"):
        (data / "one" / "below" / f"9_{ending}.png").write_bytes((data / "one" / f"1_{ending}.png").read_bytes())
    for place in ("prompts", "one"):
        (data / place / "below" / "9.txt").write_text("below, the, others")
    rows = [{"image": f"train_A/{n}.png", "target": f"train_B/{n}.png", "mask": f"masks/{n}.png"} for n in range(3)]
    (data / "masked.jsonl").write_text("".join(json.dumps({**row, "caption": "a, b, c"}) + "\n" for row in rows))
    plain = [{"image": row["image"], "target": row["target"], "caption": "a, b, c"} for row in rows]
    (data / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return folder


def outcome(folder: Path, scenario: str, added: str, dataset: str = "") -> tuple[object, tuple[str, ...]]:
    """What becomes of a configuration (an error's text, or all that it makes), and its warnings."""
    path = folder / "run.toml"
    first, *others = SCENARIOS[scenario].split("---")
    path.write_text(
        '[model]\npretrained_model_name_or_path = "none"\n[[datasets]]\nresolution = 128\n'
        + ("" if "bucket_reso_steps" in dataset else "bucket_reso_steps = 16\n")
        + dataset
        + "".join(f"\n[[datasets.subsets]]\n{one}" for one in (first + added, *others))
    )
    try:
        run = load(["--config_file", str(path)], "cache")
        plan = make_plan(run.datasets, run.cache, ImageEncoding("vae"), Ledger(folder / "files.json"))
    except UserError as error:
        return str(error), ()
    return made_of(run, plan), (*run.warnings, *plan.notices)


def made_of(run: Run, plan: Plan) -> list:
    """All that the trainer could tell apart."""
    subsets = all_subsets(run.datasets)
    counts = trained_counts(plan.items, run.datasets, 0)
    drawn = []
    for number, subset in enumerate(subsets):
        use = use_of(subset, 0.5)
        if all(item.first.num_masks == 1 for item in plan.items if item.subset == number):
            use = replace(use, full_mask_rate=0.0)  # there is no full mask among one
        drawn.append(use if counts[number] else None)
    items = [(item.key, item.captions, item.sizes[0][0].size, [one.fingerprint for one in item.recipes])
             for item in plan.items]  # fmt: skip
    found = [share for share in shares(plan.subset_names, subsets, counts) if share.num_items]
    return [items, found, drawn]


def test_every_key_of_a_data_set_is_looked_at() -> None:
    assert set(KEYS) | NOT_HERE == {*SubsetTable.model_fields, *DatasetTable.model_fields}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_key_acts_or_is_said_not_to(scenario: str, folder: Path, monkeypatch) -> None:
    if "dataset_name" in SCENARIOS[scenario]:
        write_parquet(folder, monkeypatch)
    before, _ = outcome(folder, scenario, "")
    assert not isinstance(before, str), before
    silent, wrong = [], []
    for name, value in KEYS.items():
        if f"{name} = " in SCENARIOS[scenario]:
            continue
        in_dataset = name in DatasetTable.model_fields
        line = f"{name} = {value}\n"
        after, warnings = outcome(folder, scenario, "" if in_dataset else line, line if in_dataset else "")
        warned = any(f"{name} does nothing" in warning for warning in warnings)
        if after == before and not warned:
            silent.append(name)
        if after != before and warned:
            wrong.append(name)
    assert not silent and not wrong, f"silent: {silent}; warned and yet acting: {wrong}"


@pytest.mark.parametrize("name", ["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"])
def test_buckets_that_are_off_need_no_limits(name: str, folder: Path) -> None:
    _, warnings = outcome(folder, "edit", "", f"enable_bucket = false\n{name} = {KEYS[name]}\n")
    assert any(f"{name} does nothing" in warning for warning in warnings)


@pytest.mark.parametrize("scenario", ["mask", "generated masks", "joined"])
def test_size_mismatch_needs_pairs(scenario: str, folder: Path) -> None:
    _, warnings = outcome(folder, scenario, 'size_mismatch = "crop"')
    assert any("size_mismatch does nothing" in warning for warning in warnings)


def write_parquet(folder: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    data = folder / "data"
    made = datasets.Dataset.from_dict(
        {
            "image": [str(data / "train_A" / f"{number}.png") for number in range(3)],
            "target": [str(data / "train_B" / f"{number}.png") for number in range(3)],
            "caption": ["a, b, c"] * 3,
        }
    )
    for column in ("image", "target"):
        made = made.cast_column(column, datasets.Image())
    made.to_parquet(data / "rows.parquet")
