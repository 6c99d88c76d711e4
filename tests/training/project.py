"""A whole small project on disk: a tiny base, pairs in two sizes, their cache; and the real commands run in-process."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from PIL import Image

from library import caching, training
from library.config import load
from library.files import atomic_write
from library.start import run_command
from library.tensorfile import data_hash
from tests.tiny import tiny_base

SIZES = ((64, 64), (96, 64))
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple")


def make_pairs(folder: Path, count: int = 7) -> None:
    """Sources, targets and captions; the target differs from the source in its left half."""
    for name in ("source", "target", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        pixels = numpy.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / "source" / f"{index}.png")
        changed = pixels.copy()
        changed[:, : width // 2] = 255 - changed[:, : width // 2]
        Image.fromarray(changed).save(folder / "target" / f"{index}.png")
        mask = numpy.zeros((height, width), dtype=numpy.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
        text = f"make it {COLOURS[index % len(COLOURS)]}"
        (folder / "source" / f"{index}.txt").write_text(text, encoding="utf-8")


DATASET = """
[[datasets]]
resolution = 64
bucket_reso_steps = 16
train_batch_size = {batch}
validation_split = {held_out}

[[datasets.subsets]]
image_dir = "source"
target_dir = "target"
mode = "edit"
{subset}
"""


@dataclass
class Project:
    """Where everything is. `train` and `cache` take keys as they would stand on the command line."""

    root: Path
    base: Path
    batch: int = 2
    held_out: float = 0.0
    subset: str = ""
    settings: dict = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The TOML file, written anew."""
        path = self.root / "run.toml"
        data = DATASET.format(batch=self.batch, held_out=self.held_out, subset=self.subset)
        atomic_write(path, data)  # several children may write it, and read it, at once
        return path

    def words(self, output: str, **keys: object) -> list[str]:
        """The command line of a call."""
        given = {
            "pretrained_model_name_or_path": self.base,
            "dataset_cache_dir": self.root / "cache",
            "output_dir": self.root / output,
            "output_name": "net",
            "seed": 7,
            "max_train_steps": 3,
            "network_dim": 4,
            "learning_rate": 1e-3,
            "save_every_n_steps": 100,
            "report_to": "none",
            "report_html": False,
            "device": "cpu",
            **self.settings,
            **keys,
        }
        words = ["--config_file", str(self.config)]
        for name, value in given.items():
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return words

    def cache(self) -> "Project":
        """Run the caching command."""
        assert run_command("cache", caching.run, self.words("unused")) == 0
        return self

    def train(self, output: str = "out", **keys: object) -> int:
        """Run the training command; returns the exit code."""
        return run_command("train", training.run, self.words(output, **keys))

    def run(self, output: str = "out", **keys: object):
        """The configuration of a training command."""
        return load(self.words(output, **keys), "train")

    def trained(self, output: str = "out", name: str = "net") -> str:
        """Hash of a network's tensors."""
        return data_hash(self.root / output / f"{name}.safetensors")

    def hash_of(self, output: str, name: str) -> str:
        """Hash of any file."""
        return hashlib.sha256((self.root / output / name).read_bytes()).hexdigest()


def make_project(root: Path, base: Path | None = None, **options) -> Project:
    """Pairs, base and cache in `root`."""
    make_pairs(root)
    project = Project(root, base or tiny_base(root / "base"), **options)
    return project.cache()
