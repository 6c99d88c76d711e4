"""What the trainer makes of sources that changed after they were cached: it looks at stats and names alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from library import caching
from library.data import footprint
from library.data.cached import open_cache
from library.errors import CacheError
from tests.caching.conftest import EDIT, picture

TABLE = 'metadata_file = "data/items.jsonl"\nmode = "edit"'


def write_table(data: Path, name: str = "items.jsonl", count: int = 4, caption: str = "red") -> Path:
    rows = [
        {"image": f"train_A/{number}.png", "target": f"train_B/{number}.png", "caption": caption}
        for number in range(count)
    ]
    (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data / name


def gone(name: str):
    return lambda data: (data / name).unlink()


CHANGES = {
    "a row less": (TABLE, lambda data: write_table(data, count=3), "items.jsonl has changed"),
    "another caption in the table": (TABLE, lambda data: write_table(data, caption="blue"), "items.jsonl has changed"),
    "the table is gone": (TABLE, gone("items.jsonl"), "items.jsonl is gone"),
    "an image is gone": (EDIT, gone("train_A/1.png"), "train_A/1.png is gone"),
    "a target is gone": (EDIT, gone("train_B/1.png"), "train_B/1.png is gone"),
    "a caption is gone": (EDIT, gone("prompts/1.txt"), "prompts/1.txt is gone"),
    "a new image": (EDIT, lambda data: picture(9).save(data / "train_A" / "9.png"), "train_A/9.png is new"),
    "a new caption": (
        EDIT + 'instance_prompt = "red"',
        lambda data: (data / "prompts" / "9.txt").write_text("blue"),
        "prompts/9.txt is new",
    ),
    "a new image below": (
        EDIT + "recursive = true",
        lambda data: [(data / "train_A" / "b").mkdir(), picture(9).save(data / "train_A" / "b" / "9.png")],
        "9.png is new",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_trainer_refuses_what_is_no_longer_the_data(name, pairs, configured) -> None:
    subset, change, said = CHANGES[name]
    write_table(pairs)
    caching.run(configured(subset))
    run = configured(subset, command="train")
    open_cache(run)
    change(pairs)
    with pytest.raises(CacheError, match=said):
        open_cache(run)


def test_strays_and_items_that_were_skipped_are_no_news(pairs, configured) -> None:
    (pairs / "train_A" / "2.png").write_bytes(b"no picture")
    run = configured(arguments=("--skip_bad",))
    caching.run(run)
    (pairs / "train_A" / "notes.md").write_text("written later")
    (pairs / "train_A" / "below").mkdir()
    picture(3).save(pairs / "train_A" / "below" / "3.png")  # not recursive
    assert len(open_cache(run).items) == 3


def test_folders_that_are_gone_or_emptied_are_no_change(pairs, configured) -> None:
    caching.run(configured())
    for path in (pairs / "train_B").iterdir():
        path.unlink()
    open_cache(configured(command="train"))
    shutil.rmtree(pairs)
    open_cache(configured(command="train"))


def test_a_caption_that_changes_while_it_is_cached_is_stale(pairs, configured, monkeypatch) -> None:
    from importlib import import_module

    command = import_module("library.caching.run")
    promise = command._promise

    def rewrite_then_promise(*arguments) -> None:
        (pairs / "prompts" / "1.txt").write_text("another caption")
        promise(*arguments)

    monkeypatch.setattr(command, "_promise", rewrite_then_promise)
    caching.run(configured())
    with pytest.raises(CacheError, match=r"1\.txt has changed"):
        open_cache(configured())


def test_unchanged_sources_are_looked_at_but_never_read(pairs, configured, monkeypatch) -> None:
    write_table(pairs)
    for subset in (EDIT, TABLE):
        caching.run(configured(subset))
        with monkeypatch.context() as patched:
            patched.setattr(footprint, "sha256_file", None)
            open_cache(configured(subset))


@pytest.mark.parametrize("layout", ["parquet", "folder"])
def test_rows_of_a_local_table_of_the_datasets_library_are_watched(
    layout, pairs, configured, tmp_path, monkeypatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    place = tmp_path / ("rows.parquet" if layout == "parquet" else "rows")

    def write(caption: str) -> None:
        rows = {
            "image": [str(pairs / "train_A" / f"{number}.png") for number in range(4)],
            "target": [str(pairs / "train_B" / f"{number}.png") for number in range(4)],
            "caption": [caption] * 4,
        }
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        table = table.cast_column("target", datasets.Image())
        table.to_parquet(str(place)) if layout == "parquet" else table.save_to_disk(str(place))

    write("red")
    subset = f'dataset_name = "{place}"\ntarget_column = "target"\ncaption_column = "caption"\nmode = "edit"'
    run = configured(subset)
    caching.run(run)
    open_cache(run)
    write("a blue square")
    with pytest.raises(CacheError, match="has changed|is new|is gone"):
        open_cache(run)
    caching.run(run)
    assert "a blue square" in [text.caption for text in open_cache(run).manifest.texts]
