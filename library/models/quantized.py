"""A quantised base on disk: what loading made of a checkpoint, so that the next start only reads it.

A folder of safetensors shards and `quantized.json`, which says what it was made from and how. A quantised weight is
several tensors, named `<path>.weight/<part>`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from library.errors import ModelError
from library.files import FileStat, atomic_folder, atomic_write
from library.memory.precision import QUANTISED
from library.models.keymap import Entry, entries
from library.models.readers import SafetensorsReader
from library.models.shape import FluxShape
from library.tensorfile import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.flux import FluxTransformer
    from library.models.load import Residence

DESCRIPTION = "quantized.json"
FORMAT_VERSION = 1
SHARD_BYTES = 2 << 30


def description(files: list[Path], residence: Residence, dtype: str, shape: FluxShape) -> dict:
    """What a quantised base must say about itself to stand for these files in this precision."""
    sources = []
    for file in files:
        stat = FileStat.of(file)
        sources.append({"name": file.name, "bytes": stat.size, "mtime_ns": stat.mtime_ns})
    return {
        "format_version": FORMAT_VERSION,
        "precision": residence.precision,
        "keep_precision_patterns": list(residence.keep),
        "dtype": dtype,
        "shape": json.loads(json.dumps(asdict(shape))),
        "made_from": sources,
    }


class QuantizedFile:
    """The tensors of a saved quantised base."""

    def __init__(self, folder: Path, wanted: dict):
        self.folder = folder
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if found.get(key) != value:
                what = key.replace("_", " ")
                raise ModelError(
                    f"save_quantized_base = {folder}: its {what} is {found.get(key)}, but this run wants {value}."
                    " Name another folder, or delete this one to make it anew."
                )
        shape = dict(found["shape"])
        self.shape = FluxShape(**{**shape, "axes_dim": tuple(shape["axes_dim"])})
        self.entries = entries(self.shape)
        self.reader = SafetensorsReader(sorted(folder.glob("*.safetensors")), str(folder))
        self.parts: dict[str, list[str]] = {}
        for name in self.reader.shapes:
            entry, _, part = name.partition("/")
            self.parts.setdefault(entry, []).append(part)

    def read(self, entry: Entry) -> Tensor:
        """A tensor that is stored plainly."""
        return self.reader.read(entry.name)

    def read_encoded(self, entry: Entry) -> dict[str, Tensor] | None:
        """The stored parts of a quantised weight; None for a plain tensor."""
        parts = self.parts.get(entry.name, [])
        return {part: self.reader.read(f"{entry.name}/{part}") for part in parts} if all(parts) and parts else None


def one_at_a_time(folder: Path) -> FileLock:
    """Held while a quantised base is looked for and made: of several processes one makes it, the others read it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def save(model: FluxTransformer, folder: Path, about: dict) -> None:
    """Write the model's weights as they are stored now, in shards, atomically."""
    with atomic_folder(folder) as temporary:
        shard, size, count = {}, 0, 0
        for name, tensor in _tensors(model):
            if size and size + tensor.nbytes > SHARD_BYTES:
                count += 1
                save_tensors(temporary / f"base-{count:05d}.safetensors", shard)
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        save_tensors(temporary / f"base-{count + 1:05d}.safetensors", shard)
        atomic_write(temporary / DESCRIPTION, json.dumps(about, indent=2) + "\n")


def _tensors(model: FluxTransformer):
    modules = dict(model.named_modules())
    for entry in entries(model.shape):
        path, _, leaf = entry.name.rpartition(".")
        storage = getattr(modules[path], "storage", None)
        if leaf == "weight" and storage is not None:
            for part, tensor in storage.home.items():
                yield f"{entry.name}/{part}", tensor
        else:
            yield entry.name, getattr(modules[path], leaf)


def require_quantised(precision: str, folder: Path) -> None:
    """Raise ModelError if there is nothing to save in this precision."""
    if precision not in QUANTISED:
        raise ModelError(
            f"save_quantized_base = {folder}: base_precision = {precision} is not quantised;"
            f" set it to {', '.join(QUANTISED)}, or leave save_quantized_base out"
        )
