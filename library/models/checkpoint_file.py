"""A transformer's checkpoint as our tensors: layout found from its names, every tensor accounted for.

Imports no torch until a tensor is read, so that `--dry_run` and configuration errors can ask for the shape.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import ModelError
from library.models.keymap import Entry, entries, strip_prefix
from library.models.readers import GgufReader, Reader, Renamed, SafetensorsReader, weight_files
from library.models.scaled_fp8 import Unscaled
from library.models.shape import FluxShape, shape_of_config, shape_of_diffusers_tensors, shape_of_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_STEM = "diffusion_pytorch_model"
LISTED = 8
OTHER_MODELS = ("text_encoders.", "vae.", "cond_stage_model.", "first_stage_model.")


class TransformerFile:
    """The tensors of a FLUX transformer under their BFL names, whatever file they are in.

    shape: the transformer's dimensions. `read(entry)` gives one tensor as stored, fused and in BFL's row order.
    """

    def __init__(self, reader: Reader, config: dict | None = None):
        self.source = reader.source
        self.is_diffusers = "x_embedder.weight" in reader.shapes
        self.config = config
        self.reader = reader if self.is_diffusers else _without_prefix(reader)
        # What the file is comes first: another model's tensors are no list of mistakes.
        self.shape.require_fill(self.source)
        self._check()

    @classmethod
    def open(cls, path: Path, variant: str | None = None) -> TransformerFile:
        """A diffusers transformer folder, or a single safetensors file in either naming."""
        if path.is_dir():
            config_file = path / "config.json"
            if not config_file.is_file():
                raise ModelError(f"{path} has no config.json: it is no diffusers transformer folder")
            config = json.loads(config_file.read_text(encoding="utf-8"))
            return cls(Unscaled(SafetensorsReader(weight_files(path, WEIGHTS_STEM, variant), str(path))), config)
        return cls(single_file(path))

    @cached_property
    def shape(self) -> FluxShape:
        """The dimensions, from the tensors themselves; rotary axes from the config where there is one."""
        if self.is_diffusers:
            return self._diffusers_shape()
        return shape_of_tensors(self.reader.shapes, self.source)

    @cached_property
    def entries(self) -> list[Entry]:
        """Every tensor of the transformer."""
        return entries(self.shape)

    def names_of(self, entry: Entry) -> tuple[str, ...]:
        """The file's tensors that make up an entry, in row order."""
        return entry.diffusers_names() if self.is_diffusers else (entry.name,)

    def read(self, entry: Entry) -> Tensor:
        """The entry's tensor in its stored dtype (fused where the file splits it)."""
        import torch

        pieces = [self.reader.read(name) for name in self.names_of(entry)]
        if self.is_diffusers and entry.parts[0].halves_swapped:
            pieces = list(pieces[0].chunk(2))[::-1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_encoded(self, entry: Entry) -> None:
        """Checkpoints hold weights, never our stored form of them (a `QuantizedFile` does)."""
        return None

    def _diffusers_shape(self) -> FluxShape:
        shapes = self.reader.shapes
        if self.config is None:
            return shape_of_diffusers_tensors(shapes)
        config = self.config
        found = shapes["x_embedder.weight"][1]
        if found != config.get("in_channels"):
            raise ModelError(
                f"{self.source}: config.json says in_channels = {config.get('in_channels')},"
                f" but x_embedder takes {found}"
            )
        return shape_of_config(config)

    def _check(self) -> None:
        """Every tensor must be known, there, and of the right shape."""
        expected = {}
        for entry in self.entries:
            names = self.names_of(entry)
            for name, part in zip(names, entry.parts):
                whole = len(names) == 1
                expected[name] = entry.shape if whole else (part.stop - part.start, *entry.shape[1:])
        actual = self.reader.shapes
        problems = _listed("missing", [name for name in expected if name not in actual])
        problems += _listed("unknown", [name for name in actual if name not in expected])
        wrong = [
            f"{name} {actual[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in actual and actual[name] != shape
        ]
        problems += _listed("misshapen", wrong)
        if problems:
            raise ModelError(f"{self.source} is not a whole FLUX transformer: " + "; ".join(problems))


def single_file(path: Path) -> Reader:
    """The tensors of one file, by its ending: safetensors (scaled fp8 included) or GGUF."""
    if path.suffix.lower() == ".gguf":
        return GgufReader(path, str(path))
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ModelError(f"{path}: InFlux reads .safetensors and .gguf; other files may run code when they are loaded")
    return Unscaled(SafetensorsReader([path], str(path)))


def _without_prefix(reader: Reader) -> Reader:
    """BFL's names alone: no `model.diffusion_model.`, and none of the other models of an all-in-one file."""
    prefix = strip_prefix(list(reader.shapes))
    names = {
        name[len(prefix) :]: name
        for name in reader.shapes
        if name.startswith(prefix) and not (prefix == "" and name.startswith(OTHER_MODELS))
    }
    strangers = [name for name in reader.shapes if not name.startswith((prefix, *OTHER_MODELS))]
    if strangers:
        raise ModelError(f"{reader.source}: {', '.join(strangers[:LISTED])} belong to no model that InFlux knows")
    return Renamed(reader, names)


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{len(names)} {what} ({', '.join(names[:LISTED])}{more})"]
