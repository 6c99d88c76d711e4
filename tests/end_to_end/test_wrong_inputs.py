"""What users get wrong: one plain message that names it, exit code 2, and nothing they had is touched."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.scripts import Done, run_script, succeeded

CONFIG = "config_examples/quickstart.toml"
DATA = Path("data/fill_circles")


def replaced(project: Path, old: str, new: str) -> None:
    """Change one line of the configuration."""
    path = project / CONFIG
    text = path.read_text("utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def corrupt(project: Path) -> None:
    for stem in ("00003", "00007"):
        path = project / DATA / "train_B" / f"{stem}.png"
        path.write_bytes(path.read_bytes()[:-60])


def other_mask(project: Path) -> None:
    replaced(project, 'caption_dir = "', 'mask_dir = "../data/fill_circles/train_regions"\ncaption_dir = "')
    Image.new("L", (64, 32), 255).save(project / DATA / "train_regions" / "00004.png")


def mask_missing(project: Path) -> None:
    replaced(project, 'caption_dir = "', 'mask_dir = "../data/fill_circles/train_regions"\ncaption_dir = "')
    (project / DATA / "train_regions" / "00005.png").unlink()


@dataclass(frozen=True)
class Wrong:
    """A mistake, the command that meets it, and words of its message."""

    mistake: Callable[[Path], object]
    script: str
    said: tuple[str, ...]
    words: tuple[str, ...] = ()


MISTAKES = {
    "a typo in a key": Wrong(
        lambda p: replaced(p, "learning_rate = 6e-3", "learning_rat = 6e-3"),
        "influx_train.py", ("quickstart.toml", "learning_rat", "learning_rate"),
    ),
    "a typo on the command line": Wrong(
        lambda p: None, "influx_infer.py", ("--sample_step", "sample_steps"), ("--sample_step", "3"),
    ),
    "a wrong type": Wrong(
        lambda p: replaced(p, "network_dim = 64  ", 'network_dim = "many"  '),
        "influx_cache.py", ("quickstart.toml", "network_dim", "many"),
    ),
    "a number out of range": Wrong(
        lambda p: replaced(p, "network_dim = 64  ", "network_dim = 0  "), "influx_train.py", ("network_dim", "0"),
    ),
    "broken TOML": Wrong(
        lambda p: replaced(p, 'mode = "edit"', 'mode = "edit'), "influx_cache.py", ("quickstart.toml:16", "no TOML"),
    ),
    "no such base": Wrong(
        lambda p: replaced(p, '"../nano"', '"../nana"'), "influx_cache.py", ("nana",),
    ),
    "no such data": Wrong(
        lambda p: replaced(p, "circles/train_A", "circle/train_A"), "influx_cache.py", ("fill_circle/train_A",),
    ),
    "two missing targets": Wrong(
        lambda p: [(p / DATA / "train_B" / f"{stem}.png").unlink() for stem in ("00002", "00011")],
        "influx_cache.py", ("00002", "00011", "target"),
    ),
    "a missing caption": Wrong(
        lambda p: (p / DATA / "prompts" / "00006.txt").unlink(), "influx_cache.py", ("00006", "caption"),
    ),
    "corrupt images": Wrong(corrupt, "influx_cache.py", ("00003.png", "00007.png", "damaged")),
    "a mask of another size": Wrong(other_mask, "influx_cache.py", ("train_regions/00004.png", "64x32", "64x64")),
    "a missing mask": Wrong(mask_missing, "influx_cache.py", ("00005", "mask")),
    "no cache": Wrong(lambda p: None, "influx_train.py", ("influx_cache.py", "quickstart.toml")),
    "no network": Wrong(lambda p: None, "influx_infer.py", ("quickstart.safetensors", "influx_train.py")),
    "no picture": Wrong(
        lambda p: None, "influx_infer.py", ("nowhere.png",), ("--image", "nowhere.png", "--lora", "none"),
    ),
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Every file of the user's, by the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_one_plain_message(done: Done, *words: str) -> None:
    """Exit code 2; one message on stderr, no traceback, with these words in it."""
    assert done.code == 2, done.said
    assert "Traceback" not in done.said
    assert done.err.count("error:") == 1, done.err
    message = done.err[done.err.index("error:") :]
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_loses_nothing(name: str, own_project: Path) -> None:
    wrong = MISTAKES[name]
    wrong.mistake(own_project)
    before = contents(own_project)
    done = run_script(wrong.script, "--config_file", CONFIG, *wrong.words, folder=own_project)
    is_one_plain_message(done, *wrong.said)
    after = contents(own_project)
    assert {path: after.get(path) for path in before} == before
    made = {path for path in after if path not in before}
    assert not [path for path in made if path.endswith((".safetensors", ".png"))], "nothing was begun"


@pytest.fixture
def cached_project(own_project: Path) -> Path:
    succeeded(run_script("influx_cache.py", "--config_file", CONFIG, folder=own_project))
    return own_project


def test_a_cache_of_another_configuration(cached_project: Path) -> None:
    before = contents(cached_project)
    done = run_script("influx_train.py", "--config_file", CONFIG, "--resolution", 32, folder=cached_project)
    is_one_plain_message(done, "influx_cache.py", "resolution")
    assert {path: digest for path, digest in contents(cached_project).items() if path in before} == before
    changed = cached_project / DATA / "train_B" / "00001.png"
    Image.open(changed).rotate(180).save(changed)
    done = run_script("influx_train.py", "--config_file", CONFIG, folder=cached_project)
    is_one_plain_message(done, "influx_cache.py", "00001.png")


def test_a_caption_edited_after_caching_is_no_secret(cached_project: Path) -> None:
    """A changed caption is encoded again, alone."""
    (cached_project / DATA / "prompts" / "00001.txt").write_text("a violet circle", encoding="utf-8")
    done = succeeded(run_script("influx_cache.py", "--config_file", CONFIG, folder=cached_project))
    assert "1 captions, 0 images" in done.said


def test_stray_files_are_named_and_left_out(own_project: Path) -> None:
    """Thumbs.db and the like are no reason to stop: they cannot be meant as images."""
    for folder in ("train_A", "train_B", "test_A"):
        (own_project / DATA / folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0 junk")
    done = succeeded(run_script("influx_cache.py", "--config_file", CONFIG, folder=own_project))
    assert "20 images" in done.said
    words = ["--lora", "none", "--sample_steps", 1]
    done = succeeded(run_script("influx_infer.py", "--config_file", CONFIG, *words, folder=own_project))
    assert "left out, no images: Thumbs.db" in done.said
    assert len(list((own_project / "output" / "quickstart" / "edited").glob("*.png"))) == 4
