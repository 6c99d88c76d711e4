"""Fixtures for configuration tests: a file written and loaded in one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from library.config import Command, Run, load

Loader = Callable[..., Run]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder that exists, to stand for any folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def load_toml(tmp_path: Path, images: Path) -> Loader:
    """Load `text` as run.toml, with further command-line words; a base and a data set are given on the command line."""

    def loaded(text: str, *argv: str, command: Command = "train", complete: bool = True) -> Run:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        words = ["--config_file", str(path), *argv]
        if complete and "pretrained_model_name_or_path" not in text:
            words += ["--pretrained_model_name_or_path", "owner/base"]
        if (
            complete
            and "[datasets" not in text
            and "image_dir" not in text
            and "instance_data_dir" not in " ".join(argv)
        ):
            words += ["--image_dir", str(images)]
            if not re.search(r"\bmode\b|use_split_mask", text + " ".join(argv)):
                words += ["--mode", "spatial"]
        return load(words, command)

    return loaded
