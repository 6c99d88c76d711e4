"""A token appears in no file and no message; files that travel hold no folder of this machine."""

import json
from pathlib import Path

import pytest

from library.tensorfile import read_header
from tests.seed_options.bench import Bench

TOKEN = "hf_doNotWriteThisAnywhere"


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_the_token_and_the_home_folder_stay_at_home(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(bench.root))
    words = f"--hub_token={TOKEN} --checkpointing_steps=1 --output_name=mine"
    common = "--report_html=true --report_to=tensorboard --train_embedder"
    outcome = bench.run(tmp_path / "out", words, common, capsys=capsys)
    assert (outcome.cached, outcome.trained) == (0, 0), outcome.messages
    assert TOKEN not in outcome.messages
    written = files(outcome.folder, bench.root / "cache")
    assert len(written) > 5
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
    networks = [path for path in outcome.folder.glob("*.safetensors")]
    assert len(networks) >= 2
    for path in networks:
        metadata = json.dumps(read_header(path).metadata)
        assert "influx" in metadata
        for private in (bench.root, bench.base, outcome.folder):
            assert str(private) not in metadata, (path, private)


def test_a_token_in_a_mistyped_command_is_not_repeated(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = bench.run(tmp_path / "out", f"--hub_token={TOKEN} --rnak=4 --learning_rate=x", capsys=capsys)
    assert outcome.cached == 2 and "--rnak" in outcome.messages
    assert TOKEN not in outcome.messages
