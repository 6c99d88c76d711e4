"""Options that say where items come from when they are no folders, and where a finished network goes."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from PIL import Image

from tests.seed_options.bench import WORDS, Bench, picture

NO_FOLDERS = "--no:instance_data_dir --no:target_data_dir --no:caption_data_dir"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, 64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(rows: int) -> bytes:
    pixels = numpy.zeros((64, 64), dtype=numpy.uint8)
    pixels[:rows] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


COLUMNS = ("image", "other_image", "edited", "other_edited", "region", "other_region", "words", "other_words")


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local data set with two columns for every role, in two configurations."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub_set")
    for number, name in enumerate(("one", "two")):
        rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
        for index in range(4):
            first = 1000 * number + 10 * index
            for offset, column in enumerate(COLUMNS[:4]):
                rows[column].append({"bytes": png(first + offset), "path": None})
            for depth, column in enumerate(COLUMNS[4:6]):
                rows[column].append({"bytes": mask_png(16 * (depth + 1)), "path": None})
            rows["words"].append(f"make it {WORDS[index]}")
            rows["other_words"].append(f"a {WORDS[index]} circle")
        features = {column: datasets.Image() for column in COLUMNS[:6]}
        features |= {column: datasets.Value("string") for column in COLUMNS[6:]}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
            str(folder / f"{name}.parquet")
        )
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}.parquet" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n", encoding="utf-8")
    return folder


ONE = "--dataset_name={set}/one.parquet"
EDIT = f"{NO_FOLDERS} --target_column=edited --caption_column=words"
CASES = {
    "dataset_name": (ONE, "--dataset_name={set}/two.parquet", EDIT),
    "dataset_config_name": ("--dataset_config_name=one", "--dataset_config_name=two", f"--dataset_name={{set}} {EDIT}"),
    "image_column": ("--image_column=image", "--image_column=other_image", f"{ONE} {EDIT}"),
    "target_column": ("--target_column=edited", "--target_column=other_edited",
                      f"{ONE} {NO_FOLDERS} --caption_column=words"),
    "caption_column": ("--caption_column=words", "--caption_column=other_words",
                       f"{ONE} {NO_FOLDERS} --target_column=edited"),
    "mask_column": ("--mask_column=region", "--mask_column=other_region",
                    f"{ONE} {NO_FOLDERS} --caption_column=words --mode=mask"),
}  # fmt: skip


@pytest.mark.parametrize("option", CASES)
def test_columns_and_names_of_a_data_set(option: str, bench: Bench, tmp_path: Path, parquet: Path, capsys) -> None:
    outcomes = []
    for name, words in zip(("one", "other"), CASES[option]):
        common = CASES[option][2].replace("{set}", str(parquet))
        outcomes.append(bench.run(tmp_path / name, words.replace("{set}", str(parquet)), common, capsys=capsys))
    assert [outcome.trained for outcome in outcomes] == [0, 0], outcomes[0].messages + outcomes[1].messages
    assert outcomes[0].network != outcomes[1].network


def test_columns_of_a_table_need_no_datasets_package(bench: Bench, tmp_path: Path, capsys) -> None:
    table = bench.root / "items.jsonl"
    rows = [
        {"image": f"source/{i}.png", "edited": f"target/{i}.png", "other": f"target_b/{i}.png", "words": "make it red"}
        for i in range(4)
    ]
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    common = f"--metadata_file={table} {NO_FOLDERS} --caption_column=words"
    outcomes = [
        bench.run(tmp_path / column, f"--target_column={column}", common, capsys=capsys)
        for column in ("edited", "other")
    ]
    assert [outcome.trained for outcome in outcomes] == [0, 0], outcomes[0].messages
    assert outcomes[0].network != outcomes[1].network


class Hub:
    """Stands for the hub's interface: remembers what it was asked."""

    calls: list[tuple[str, object]] = []

    def __init__(self, endpoint: str | None = None, token: str | None = None):
        self.token = token
        self.calls.append(("token", token))

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repository: str, **_: object) -> SimpleNamespace:
        self.calls.append(("repository", repository))
        return SimpleNamespace(repo_id=repository, url=f"https://hub/{repository}")

    def create_commit(self, repository: str, operations: list, **_: object) -> SimpleNamespace:
        self.calls.append(("files", sorted(operation.path_in_repo for operation in operations)))
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


def test_push_to_hub_hub_token_and_hub_model_id(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert bench.run(tmp_path / "quiet", "", capsys=capsys).trained == 0
    assert Hub.calls == []
    for token, name in (("hf_one", "me/first"), ("hf_two", "second")):
        words = f"--push_to_hub --hub_token={token} --hub_model_id={name}"
        assert bench.run(tmp_path / token, words, capsys=capsys).trained == 0
    assert list(dict.fromkeys(value for kind, value in Hub.calls if kind == "token")) == ["hf_one", "hf_two"]
    assert [value for kind, value in Hub.calls if kind == "repository"] == ["me/first", "me/second"]
    assert all({"README.md", "last.safetensors"} <= set(value) for kind, value in Hub.calls if kind == "files")
