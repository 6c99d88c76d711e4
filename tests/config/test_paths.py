"""Relative paths belong to the file that names them; hub ids stay what they are."""

import os
from pathlib import Path

import pytest

from library.config import load


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a configuration in a folder of its own, and the shell standing elsewhere."""
    for folder in ("project/configs", "project/images", "project/base", "shell/images"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shell")
    return tmp_path / "project"


def write(project: Path, text: str) -> list[str]:
    (project / "configs/run.toml").write_text(text)
    return ["--config_file", str(project / "configs/run.toml")]


def test_a_path_in_a_file_is_relative_to_the_file(project: Path) -> None:
    text = 'pretrained_model_name_or_path = "../base"\nimage_dir = "../images"\nmode = "spatial"\noutput_dir = "out"\n'
    run = load(write(project, text), "train")
    assert run.model.pretrained_model_name_or_path == str(project / "base")
    assert run.datasets[0].subsets[0].image_dir == project / "images"
    assert run.saving.output_dir == project / "configs/out"
    assert run.logging.logging_dir == project / "configs/out/logs"
    assert run.cache.dataset_cache_dir == project / "configs/out/dataset_cache"


def test_a_path_on_the_command_line_is_relative_to_the_shell(project: Path) -> None:
    words = write(project, 'pretrained_model_name_or_path = "a/b"\nimage_dir = "../images"\nmode = "spatial"\n')
    run = load([*words, "--image_dir", "images", "--dataset_cache_dir", "cache", "--logging_dir", "tb"], "train")
    shell = project.parent / "shell"
    assert run.datasets[0].subsets[0].image_dir == shell / "images"
    assert run.cache.dataset_cache_dir == shell / "cache"
    assert run.saving.output_dir == shell / "flux-dreambooth-lora"
    assert run.logging.logging_dir == shell / "flux-dreambooth-lora/tb"


@pytest.mark.parametrize(
    ("written", "is_path"),
    [
        ("black-forest-labs/FLUX.1-Fill-dev", False),
        ("base", True),
        ("./missing", True),
        ("models/flux.safetensors", True),
        ("flux-fill-Q4_K.gguf", True),
        ("a/b/c", True),
        (".hidden/x", True),
    ],
)
def test_hub_ids_and_paths(written: str, is_path: bool, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    text = ["--pretrained_model_name_or_path", written, "--image_dir", "images", "--mode", "spatial"]
    found = load(text, "train").model.pretrained_model_name_or_path
    assert found == (os.path.join(project, os.path.normpath(written)) if is_path else written)


def test_home_is_expanded_and_absolute_paths_stay(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    words = write(project, 'pretrained_model_name_or_path = "a/b"\nmode = "spatial"\n')
    run = load([*words, "--image_dir", "~/images", "--output_dir", "/tmp/./x/../y"], "train")
    assert run.datasets[0].subsets[0].image_dir == project / "images"
    assert run.saving.output_dir == Path("/tmp/y")


def test_lists_of_paths_and_the_words_that_are_none(project: Path) -> None:
    (project / "a.safetensors").touch()
    words = write(project, 'pretrained_model_name_or_path = "a/b"\nimage = "../images"\nlora = "../a.safetensors"\n')
    assert load(words, "infer").inference.lora == (str(project / "a.safetensors"),)
    assert load([*words, "--lora", "none"], "infer").inference.lora == ("none",)
    assert load([*words, "--lora", "x.safetensors", "/y.safetensors"], "infer").inference.lora == (
        str(project.parent / "shell/x.safetensors"),
        "/y.safetensors",
    )


def test_resume_takes_a_folder_or_the_word_latest(project: Path) -> None:
    words = write(project, 'pretrained_model_name_or_path = "a/b"\nimage_dir = "../images"\nmode = "spatial"\n')
    assert load([*words, "--resume_from_checkpoint", "latest"], "train").saving.resume == "latest"
    states = load([*words, "--resume", "../project/images"], "train").saving.resume
    assert states == str(project / "images")
