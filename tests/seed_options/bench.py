"""A project small enough to cache and train in a second, driven by command lines as InFluxEdit's users write them.

An option acts if two of its values lead to outcomes that differ where the option says they must.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from library import caching, training
from library.start import run_command
from library.tensorfile import data_hash, read_header

SIZES = ((64, 64), (96, 64))
WORDS = ("red", "green", "blue", "yellow", "black")


def picture(seed: int, width: int, height: int) -> numpy.ndarray:
    """Smooth colours and a little noise: every picture is another, and every crop of it too."""
    random = numpy.random.default_rng(seed)
    rows, columns = numpy.mgrid[0:height, 0:width]
    waves = [numpy.sin(rows / random.uniform(3, 20) + columns / random.uniform(3, 20)) for _ in range(3)]
    pixels = numpy.stack(waves, axis=-1) * 100 + 128 + random.normal(0, 8, (height, width, 3))
    return pixels.clip(0, 255).astype(numpy.uint8)


def make_data(folder: Path, count: int = 5) -> None:
    """Folders A and B for every role, so that an option naming a folder has two values."""
    for number, name in enumerate(("source", "source_b", "target", "target_b", "joined", "masks", "masks_b", "class")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            width, height = SIZES[index % 2]
            if name == "joined":
                width *= 2
            pixels = picture(100 * number + index, width, height)
            if name.startswith("masks"):
                pixels = numpy.zeros((height, width), dtype=numpy.uint8)
                pixels[: height // (2 if name == "masks" else 4)] = 255
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    for name in ("captions", "captions_b"):
        (folder / name).mkdir()
        for index in range(count):
            text = f"make it {WORDS[index]}" if name == "captions" else f"a {WORDS[index]} circle"
            (folder / name / f"{index}.txt").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What a call left behind: exit codes, messages, and the files of the run."""

    cached: int
    trained: int
    messages: str
    folder: Path

    @property
    def network(self) -> str:
        """Hash of everything that was trained."""
        return data_hash(self.folder / "last.safetensors")

    @property
    def names(self) -> set[str]:
        """Tensor names in the network's file."""
        return set(read_header(self.folder / "last.safetensors").tensors)

    @property
    def dtypes(self) -> set[str]:
        """Precisions in the network's file."""
        return {info.dtype for info in read_header(self.folder / "last.safetensors").tensors.values()}

    @property
    def files(self) -> set[str]:
        """Everything in the output folder."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}

    @property
    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.metrics)

    @property
    def pictures(self) -> list[Path]:
        """Previews, without the condition and target beside them."""
        return sorted(path for path in self.folder.rglob("*.png") if path.stem[-8:].isdecimal())


@dataclass
class Bench:
    """Where the data and the base are. Folders in a command line are written as {source}, {target}, ..."""

    root: Path
    base: Path

    def folder_words(self, words: str) -> list[str]:
        """The words of a command line; `~` stands for a space within a word."""
        names = {path.name: str(path) for path in self.root.iterdir()}
        return [word.replace("~", " ").format(**names, base=self.base) for word in words.split()]

    def words(self, output: Path, words: str, common: str) -> list[str]:
        """A command line from the option's words, the case's common words, and what every case needs."""
        given = self.folder_words(f"{words} {common}")
        names = {word[2:].partition("=")[0] for word in given if word.startswith("--")}
        usual = {
            "pretrained_model_name_or_path": str(self.base),
            "instance_data_dir": str(self.root / "source"),
            "target_data_dir": str(self.root / "target"),
            "caption_data_dir": str(self.root / "captions"),
            "mode": "edit",
            "resolution": "64",
            "bucket_reso_steps": "16",
            "train_batch_size": "2",
            "max_train_steps": "2",
            "seed": "3",
            "report_to": "none",
            "report_html": "false",
            "device": "cpu",
            "cache_workers": "0",
            "output_dir": str(output),
            "dataset_cache_dir": str(self.root / "cache"),
        }
        replaced = {"num_train_epochs": "max_train_steps", "dataset_name": "instance_data_dir", "size": "resolution"}
        leave_out = names | {replaced[name] for name in names & set(replaced)}
        leave_out |= {word[5:] for word in given if word.startswith("--no:")}
        given = [word for word in given if not word.startswith("--no:")]
        return [*given, *(f"--{name}={value}" for name, value in usual.items() if name not in leave_out)]

    def run(self, output: Path, words: str, common: str = "", train: bool = True, capsys=None) -> Outcome:
        """Cache and train with the same command line, as a user would."""
        command = self.words(output, words, common)
        cached = run_command("cache", caching.run, command)
        trained = run_command("train", training.run, command) if train and cached == 0 else cached
        messages = "".join(capsys.readouterr()) if capsys is not None else ""
        given = [word.partition("=")[2] for word in command if word.startswith("--output_dir=")]
        return Outcome(cached, trained, messages, Path(given[0]))
