"""The text encoders: CLIP-L's pooled vector and T5's token embeddings, as FluxFillPipeline computes them.

Loading is strict, because the libraries are not: a tokenizer can come back empty and a text encoder with random
weights without an error from anywhere. Only the caching command (and inference) imports this to encode.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import ModelError
from library.memory.linear import Linear
from library.memory.precision import STORAGES, make_storage
from library.models.vae import load_strictly

if TYPE_CHECKING:
    from library.models.readers import Reader

SPARE_ROWS = 128
PROBE = "red circle"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILT_IN = {"clip": (ASSETS / "clip_tokenizer", 49408), "t5": (ASSETS / "t5_tokenizer", 32128)}
"""Folder of FLUX.1's own tokenizer and the number of rows of the text encoder it belongs to."""
GOLDEN_TEXT = "Replace the red circle with a blue one, keep the background!"
GOLDEN_IDS = {
    "clip": [49406, 9466, 518, 736, 7117, 593, 320, 1746, 637, 267, 1726, 518, 5994, 256, 49407],
    "t5": [28035, 8, 1131, 8196, 28, 3, 9, 1692, 80, 6, 453, 8, 2458, 55, 1],
}
LAYERWISE_CAPTIONS = 512
"""Captions to give a layerwise encoder at once: their hidden states wait in RAM (4.2 MB each in bf16)."""
WHOLE_T5_BYTES = 14e9
"""Device memory from which T5-XXL is kept whole in bf16 (9.5 GB, with its activations and CLIP-L)."""


@dataclass(frozen=True)
class TextEmbeddings:
    """T5's embeddings (B, L, D) and CLIP's pooled vectors (B, P) of a batch of captions."""

    t5: Tensor
    pooled: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same embeddings on another device."""
        return TextEmbeddings(self.t5.to(device, dtype), self.pooled.to(device, dtype))


@dataclass(frozen=True)
class Encoded:
    """What the cache keeps of a batch of captions.

    truncated: for each caption, the words that did not fit T5's length ('' if all did).
    """

    embeddings: TextEmbeddings
    t5_ids: Tensor
    clip_ids: Tensor
    truncated: list[str]


class TextEncoders:
    """CLIP-L and T5 with their tokenizers.

    With `layerwise`, T5's layers visit the device one after the other (see layerwise.py): give `encode` many captions
    at once, each layer then crosses once for all of them.
    """

    def __init__(
        self, clip: Any, t5: Any, clip_tokenizer: Any, t5_tokenizer: Any, device: torch.device, layerwise: bool = False
    ):
        self.clip = clip
        self.t5 = t5
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.device = device
        self.layerwise = layerwise
        self.captions_at_once = LAYERWISE_CAPTIONS if layerwise else 1

    def tokenize(self, captions: list[str], length: int) -> tuple[Tensor, Tensor, list[str]]:
        """T5 ids (B, length), CLIP ids (B, 77), and the words of each caption that T5 does not see."""
        t5_ids = _padded(self.t5_tokenizer, captions, length)
        clip_ids = _padded(self.clip_tokenizer, captions, self.clip.config.max_position_embeddings)
        whole = self.t5_tokenizer(captions, padding=False, truncation=False, verbose=False).input_ids
        cut = [self.t5_tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in whole]
        return t5_ids, clip_ids, cut

    @torch.no_grad()
    def encode(self, captions: list[str], length: int) -> Encoded:
        """Embed captions; T5 sees `length` tokens and attends to its padding, as FLUX was trained."""
        t5_ids, clip_ids, cut = self.tokenize(captions, length)
        pooled = self.clip(clip_ids.to(self.device)).pooler_output
        embedded = self.t5(t5_ids.to(self.t5.device)).last_hidden_state
        return Encoded(TextEmbeddings(embedded, pooled), t5_ids, clip_ids, cut)


def _padded(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip


class ClipReader:
    """CLIP-L tensors under transformers' present names: without `text_model.`, and without what only images need."""

    prefix = "text_model."
    unused = ("logit_scale", "text_projection.weight", "embeddings.position_ids")

    def __init__(self, reader: Reader):
        self.reader = reader
        self.source = reader.source
        self.names = {name.removeprefix(self.prefix): name for name in reader.shapes}
        self.shapes = {name: reader.shapes[old] for name, old in self.names.items() if name not in self.unused}

    def read(self, name: str) -> Tensor:
        return self.reader.read(self.names[name])


class T5Reader:
    """T5 tensors; the embedding is `shared.weight`, `encoder.embed_tokens.weight` or both."""

    tied = ("shared.weight", "encoder.embed_tokens.weight")

    def __init__(self, reader: Reader):
        self.reader = reader
        self.source = reader.source
        self.shapes = dict(reader.shapes)
        present = [name for name in self.tied if name in self.shapes]
        self.names = {name: name for name in self.shapes}
        for name in self.tied:
            if present and name not in self.shapes:
                self.shapes[name] = self.shapes[present[0]]
                self.names[name] = present[0]

    def read(self, name: str) -> Tensor:
        return self.reader.read(self.names[name])

    def read_to(self, name: str, device: torch.device) -> Tensor:
        """The tensor on a device, in its stored dtype (its scale applied there)."""
        return self.reader.read_to(self.names[name], device)

    def will_need(self, names: list[str]) -> None:
        """Announce what is read next."""
        self.reader.will_need([self.names[name] for name in names])


def load_clip(reader: Reader, config: dict, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen `CLIPTextModel`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    load_strictly(model, ClipReader(reader), device, dtype)
    positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
    model.embeddings.position_ids = positions
    return _frozen(model)


def load_t5(reader: Reader, config: dict, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen `T5EncoderModel`."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    load_strictly(model, T5Reader(reader), device, dtype)
    model.tie_weights()
    return _frozen(model)


def _frozen(model: Any) -> Any:
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"{type(model).__name__}: nothing was loaded into {', '.join(left[:8])}")
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, kind: str, rows: int) -> Any:
    """The tokenizer in `folder`, checked against the text encoder's vocabulary of `rows` embeddings.

    kind: 'clip' or 't5'. transformers returns an almost empty tokenizer, without an error, for a folder that lacks
    the files; this raises ModelError then.
    """
    from transformers import CLIPTokenizer, T5TokenizerFast

    try:
        tokenizer = (CLIPTokenizer if kind == "clip" else T5TokenizerFast).from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"no {kind} tokenizer can be read from {folder}: {error}") from error
    special = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    ids = tokenizer(PROBE).input_ids
    unknown = kind == "t5" and tokenizer.unk_token_id in ids
    if unknown or len([token for token in ids if token not in special]) < 2:
        raise ModelError(f"the {kind} tokenizer in {folder} is empty: it knows {len(tokenizer)} tokens and no words")
    if not rows - SPARE_ROWS <= len(tokenizer) <= rows:
        raise ModelError(
            f"the {kind} tokenizer in {folder} has {len(tokenizer)} tokens, but its text encoder has {rows}:"
            " they do not belong together"
        )
    if rows == BUILT_IN[kind][1] and tokenizer(GOLDEN_TEXT).input_ids != GOLDEN_IDS[kind]:
        raise ModelError(f"the {kind} tokenizer in {folder} does not give FLUX.1's token ids")
    return tokenizer


def built_in_tokenizer(kind: str, rows: int) -> Path:
    """The folder of FLUX.1's own tokenizer, for text encoders that come as a single file.

    Raises ModelError if the text encoder's vocabulary is another.
    """
    folder, expected = BUILT_IN[kind]
    if rows != expected:
        raise ModelError(
            f"the {kind} text encoder has {rows} embeddings and not FLUX.1's {expected}:"
            f" name its tokenizer's folder with {kind}_tokenizer"
        )
    return folder


def wants_layerwise(wanted: bool | None, device: torch.device) -> bool:
    """Whether T5 visits the device layer by layer: as asked, else on cards that cannot hold it."""
    if wanted is not None:
        return wanted
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < WHOLE_T5_BYTES


def quantise(model: nn.Module, precision: str) -> None:
    """Keep the weights of a text encoder's linears in int8, fp8 or nf4 (on the device they are on)."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _quantised(child, precision))


def _quantised(linear: nn.Linear, precision: str) -> Linear:
    with torch.device("meta"):
        replacement = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    replacement.bias = linear.bias
    shape = (linear.out_features, linear.in_features)
    kind = STORAGES[precision]
    tensors = kind.encode(linear.weight.detach(), kind.layout(shape, linear.weight.dtype))
    replacement.set_storage(make_storage(precision, shape, tensors))
    return replacement
