"""A base model as the user names it: where its parts are, what shape they have, and how each is loaded.

A base is a folder in FLUX.1-Fill-dev's layout, a hub id, or a set of single files. Opening one reads no weight and
imports no torch; every `load_*` method does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.config.tables.memory import MemoryTable
from library.config.tables.model import ModelTable
from library.errors import ModelError
from library.files import sha256_file
from library.models.checkpoint_file import TransformerFile
from library.models.hub import component_folder
from library.models.readers import Reader, SafetensorsReader, weight_files
from library.models.scaled_fp8 import Unscaled
from library.models.shape import FluxShape
from library.models.single_files import component_file, holds

if TYPE_CHECKING:
    import torch

    from library.models.flux import FluxTransformer
    from library.models.text import TextEncoders
    from library.models.vae import Parts, Vae

Part = Literal["transformer", "vae", "text_encoders"]
SINGLE_FILES = (".safetensors", ".gguf", ".sft")
FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class Defaults:
    """What a base wants unless the user says otherwise; `influx.json` in its folder overrides FLUX.1 Fill's."""

    t5xxl_max_token_length: int = 512
    sample_guidance_scale: float = 30.0
    sample_steps: int = 50


class Base:
    """A base model. Make one with `Base.open`."""

    def __init__(self, table: ModelTable):
        self.table = table
        self.name: str = table.pretrained_model_name_or_path or ""

    @classmethod
    def open(cls, table: ModelTable) -> Base:
        """Find the base. Raises ModelError if nothing is named or a named file is not there; reads no weights."""
        if not table.pretrained_model_name_or_path and not table.transformer:
            raise ModelError("no base model: set pretrained_model_name_or_path to a folder, a hub id or a single file")
        for key in ("transformer", "ae", "clip_l", "t5xxl", "clip_tokenizer", "t5_tokenizer"):
            path = getattr(table, key)
            if path is not None and not Path(path).exists():
                raise ModelError(f"{key} = {path}: there is no such file or folder")
        return cls(table)

    @property
    def is_single_file(self) -> bool:
        """Whether the base itself is one transformer file, without text encoders, VAE and tokenizers."""
        return self.name.lower().endswith(SINGLE_FILES)

    @cached_property
    def transformer_file(self) -> TransformerFile:
        """The transformer's tensors (headers only), checked to be a whole FLUX.1 Fill transformer."""
        path = self.table.transformer or (self.name if self.is_single_file else self._folder("transformer"))
        return TransformerFile.open(Path(path), self.table.variant)

    @property
    def shape(self) -> FluxShape:
        """The transformer's dimensions."""
        return self.transformer_file.shape

    @cached_property
    def scheduler_config(self) -> dict:
        """The sampling schedule's settings, as in `scheduler/scheduler_config.json`; FLUX.1's for single files."""
        if self.is_single_file or not self.name:
            return dict(FLUX_SCHEDULER)
        return _read_json(self._folder("scheduler") / "scheduler_config.json")

    @cached_property
    def defaults(self) -> Defaults:
        """Token length, guidance and steps for this base."""
        file = Path(self.name) / "influx.json"
        if self.is_single_file or not self.name or not file.is_file():
            return Defaults()
        return replace(Defaults(), **_read_json(file))

    @cached_property
    def clip_linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of CLIP-L's linears by name, as `encoder.layers.0.self_attn.q_proj`; from the header alone."""
        part = TEXT_PARTS[0]
        reader, _ = _component(self._path(part.key, part.folder), "model", self.table.variant, part.key)
        weights = {name: shape for name, shape in reader.shapes.items() if name.endswith(".weight") and len(shape) == 2}
        return {name.removeprefix("text_model.").removesuffix(".weight"): shape for name, shape in weights.items()}

    def files(self, part: Part) -> list[Path]:
        """The files that a part is read from: weights, configuration and, for text encoders, tokenizers."""
        if part == "transformer":
            return [Path(path) for path in self.transformer_file.reader.files]
        if part == "vae":
            return _files_of(self._path("ae", "vae"), "diffusion_pytorch_model", self.table.variant)
        found = []
        for part_of_text in TEXT_PARTS:
            found += _files_of(self._path(part_of_text.key, part_of_text.folder), "model", self.table.variant)
            folder = self._tokenizer(part_of_text)
            found += sorted(file for file in folder.iterdir() if file.is_file()) if folder else []
        return found

    def headers(self, key: str) -> tuple[Reader, dict]:
        """Names, shapes and configuration of 'ae', 'clip_l' or 't5xxl', if they are on this machine.

        Nothing is downloaded. Raises ModelError if they are not here.
        """
        here = Base(self.table.model_copy(update={"local_files_only": True}))
        folder, stem = HEADERS[key]
        return _component(here._path(key, folder), stem, self.table.variant, key)

    def identity(self, part: Part) -> str:
        """A hash of the contents of a part's files, whatever they are called. Reads them all: callers remember it by
        the files' stat."""
        return hashlib.sha256("\n".join(sorted(map(sha256_file, self.files(part)))).encode()).hexdigest()

    def load_transformer(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, memory: MemoryTable | None = None
    ) -> FluxTransformer:
        """The frozen transformer with activations in `dtype` (float32 if not given).

        memory: precision, streaming, modulation and attention; everything resident in `dtype` if not given.
        Checkpointing and offload of activations are for training: see `set_up_training`.
        """
        from library.models.setup import load

        return load(self.transformer_file, device, dtype, memory)

    def load_vae(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        parts: Parts = "both",
        tiling: bool = False,
    ) -> Vae:
        """The VAE, or half of it, in `dtype` (float32 if not given), on large pictures tile by tile if wanted."""
        import torch

        from library.models.vae import Vae

        path = self._path("ae", "vae")
        reader, config = _component(path, "diffusion_pytorch_model", self.table.variant, "ae")
        return Vae.load(reader, config, device, dtype or torch.float32, parts, tiling)

    def load_text_encoders(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layerwise: bool = False,
        t5_precision: str | None = None,
    ) -> TextEncoders:
        """CLIP-L and T5 with their tokenizers, in `dtype` (float32 if not given).

        layerwise: bring one layer of T5 at a time from its file to the device, for cards that cannot hold it.
        t5_precision: 'int8', 'fp8' or 'nf4' to keep T5's weights so, quantised before they go to the device.
        """
        import torch

        from library.memory.precision import QUANTISED
        from library.models import text
        from library.models.layerwise import load_t5 as load_layerwise

        loaded, tokenizers = [], []
        for part, load in zip(TEXT_PARTS, (text.load_clip, text.load_t5)):
            reader, config = _component(self._path(part.key, part.folder), "model", self.table.variant, part.key)
            if part.kind == "t5" and layerwise:
                loaded.append(load_layerwise(reader, config, device, dtype or torch.float32, t5_precision))
            elif part.kind == "t5" and t5_precision in QUANTISED:
                model = load(reader, config, "cpu", dtype or torch.float32)
                text.quantise(model.encoder, t5_precision)
                loaded.append(model.to(device))
            else:
                loaded.append(load(reader, config, device, dtype or torch.float32))
            rows = loaded[-1].config.vocab_size
            folder = self._tokenizer(part) or text.built_in_tokenizer(part.kind, rows)
            tokenizers.append(text.load_tokenizer(folder, part.kind, rows))
        return text.TextEncoders(*loaded, *tokenizers, torch.device(device), layerwise)

    def load_clip(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.nn.Module:
        """CLIP-L alone, for training a network on it from cached token ids."""
        import torch

        from library.models import text

        part = TEXT_PARTS[0]
        reader, config = _component(self._path(part.key, part.folder), "model", self.table.variant, part.key)
        return text.load_clip(reader, config, device, dtype or torch.float32)

    def _path(self, key: str, folder: str) -> Path:
        """A part's own path, or its folder in the base."""
        given = getattr(self.table, key)
        if given is not None:
            return Path(given)
        if self.is_single_file and Path(self.name).is_file() and holds(Path(self.name), key):
            return Path(self.name)
        if self.is_single_file or not self.name:
            raise ModelError(f"{self.name} holds the transformer alone: set {key} to a folder or file as well")
        return self._folder(folder)

    def _tokenizer(self, part: TextPart) -> Path | None:
        """The tokenizer's folder; None where the built-in one has to do (a text encoder given as a single file)."""
        given = getattr(self.table, part.tokenizer_key)
        if given is not None:
            return Path(given)
        own = getattr(self.table, part.key)
        if own is not None and Path(own).is_file():
            return None
        return None if self.is_single_file or not self.name else self._folder(part.tokenizer)

    def _folder(self, name: str) -> Path:
        """A component's folder, downloaded from the hub if the base is a hub id."""
        return component_folder(self.table, name)


@dataclass(frozen=True)
class TextPart:
    """A text encoder: the keys that name it and its tokenizer, and their folders in a base."""

    kind: str
    key: str
    folder: str
    tokenizer_key: str
    tokenizer: str


TEXT_PARTS = (
    TextPart("clip", "clip_l", "text_encoder", "clip_tokenizer", "tokenizer"),
    TextPart("t5", "t5xxl", "text_encoder_2", "t5_tokenizer", "tokenizer_2"),
)

HEADERS = {"ae": ("vae", "diffusion_pytorch_model"), **{part.key: (part.folder, "model") for part in TEXT_PARTS}}
"""Folder and file stem of each part that is no transformer, by the key that names it."""


def _component(path: Path, stem: str, variant: str | None, key: str) -> tuple[Reader, dict]:
    """Reader and configuration of a component: a folder, or a single file."""
    if path.is_file():
        return component_file(key, path)
    reader = Unscaled(SafetensorsReader(weight_files(path, stem, variant), str(path)))
    return reader, _read_json(path / "config.json")


def _files_of(path: Path, stem: str, variant: str | None) -> list[Path]:
    return [path] if path.is_file() else [path / "config.json", *weight_files(path, stem, variant)]


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
