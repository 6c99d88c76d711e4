"""A tiny base, pictures to edit, and a way to ask for an edit as a user would."""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.config import Run, load
from tests.oracle.reference import noisy_mask, noisy_picture
from tests.tiny import tiny_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("inference") / "base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures of three sizes, masks and prompts."""
    for name in ("in", "masks", "prompts"):
        (tmp_path / name).mkdir()
    for stem, size in {"a": (64, 64), "b": (96, 64), "c": (50, 80)}.items():
        noisy_picture(*size, seed=ord(stem)).save(tmp_path / "in" / f"{stem}.png")
        noisy_mask(*size).save(tmp_path / "masks" / f"{stem}.png")
        (tmp_path / "prompts" / f"{stem}.txt").write_text(f"a {stem} circle\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def ask(base_folder: Path, folder: Path) -> Callable[..., Run]:
    """`ask("--mode", "edit", ...)` is the configuration of that command line."""

    def make(*words: str, image: str = "in", prompt: str | None = "a red circle") -> Run:
        argv = ["--pretrained_model_name_or_path", str(base_folder), "--output_dir", str(folder / "out")]
        argv += ["--image", str(folder / image)] + ([] if prompt is None else ["--prompt", prompt])
        return load([*argv, *words], "infer")

    return make
