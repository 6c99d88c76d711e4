"""A small data set and a random base, made once; each test caches into its own folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config import Run, load
from tests.tiny import tiny_base

SIDE = 64


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A smooth random picture."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_pairs(folder: Path, count: int = 4, width: int = SIDE, height: int = SIDE) -> Path:
    """Sources, targets, masks and captions in Fill Circles' layout."""
    for name in ("train_A", "train_B", "masks", "prompts"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        picture(number, width, height).save(folder / "train_A" / f"{number}.png")
        picture(100 + number, width, height).save(folder / "train_B" / f"{number}.png")
        mask = Image.new("L", (width, height), 0)
        mask.paste(255, (8, 8, 40, 24 + 4 * number))
        mask.save(folder / "masks" / f"{number}.png")
        (folder / "prompts" / f"{number}.txt").write_text(f"red circle number {number % 3}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny FLUX.1 Fill."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pairs of 64x64."""
    return write_pairs(tmp_path / "data")


EDIT = """
image_dir = "data/train_A"
target_dir = "data/train_B"
caption_dir = "data/prompts"
mode = "edit"
"""


@pytest.fixture
def configured(tmp_path: Path, base: Path):
    """A function from TOML of a subset, a data set and other tables to a loaded Run, in the test's folder."""

    def configure(
        subset: str = EDIT, dataset: str = "", rest: str = "", arguments: tuple[str, ...] = (), command: str = "cache"
    ) -> Run:
        text = f"""
        [model]
        pretrained_model_name_or_path = "{base}"
        [cache]
        dataset_cache_dir = "cache"
        {rest}
        [[datasets]]
        {"" if "resolutions" in dataset else f"resolution = {SIDE}"}
        bucket_reso_steps = 16
        {dataset}
        """ + "".join(f"[[datasets.subsets]]\n{one}\n" for one in subset.split("---"))
        path = tmp_path / "run.toml"
        path.write_text("\n".join(line.strip() for line in text.splitlines()), encoding="utf-8")
        return load(["--config_file", str(path), *arguments], command)

    return configure
