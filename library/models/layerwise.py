"""T5 for machines that can hold it neither on the card nor in RAM: its layers visit the device one after the other.

A layer's weights stay mapped from the checkpoint, in the dtype they have there, until it computes; they cross to the
device as they are and are converted on it. Every caption goes through a layer before the next one comes, so each weight
crosses once; the hidden states wait in RAM and are overwritten in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from library.memory.precision import QUANTISED, STORAGES, make_storage
from library.models.readers import Reader
from library.models.text import T5Reader
from library.models.vae import load_strictly

BATCH = 8
"""Captions in a layer at once."""
LAYERS = "encoder.block."


@dataclass(frozen=True)
class MappedWeights:
    """One layer's parameters in the file. linears: those that are quantised, if `precision` says so."""

    reader: T5Reader
    prefix: str
    names: tuple[str, ...]
    linears: frozenset[str]
    dtype: torch.dtype
    precision: str | None

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The parameters on the device, in the encoder's dtype."""
        found = {}
        for name in self.names:
            value = self.reader.read_to(self.prefix + name, device).to(self.dtype)
            found[name] = _through(value, self.precision) if name in self.linears else value
        return found

    def announce(self) -> None:
        """Let the system read them from the disk while something else computes."""
        self.reader.will_need([self.prefix + name for name in self.names])


def _through(weight: Tensor, precision: str | None) -> Tensor:
    """The weight that is left of it in a stored precision."""
    if precision not in QUANTISED:
        return weight
    shape, kind = tuple(weight.shape), STORAGES[precision]
    encoded = kind.encode(weight, kind.layout(shape, weight.dtype))
    return make_storage(precision, shape, encoded).dequantized(weight.dtype)


class LayerByLayer(nn.Module):
    """A T5 block that visits the device once for all captions."""

    def __init__(self, block: nn.Module, weights: MappedWeights, following: MappedWeights | None, device: torch.device):
        super().__init__()
        self.block = block
        self.weights = weights
        self.following = following
        self.device = device

    def forward(self, hidden: Tensor, mask: Tensor | None, bias: Tensor | None, *rest: Any, **keywords: Any) -> tuple:
        """As T5's own block; `hidden` (N, L, D) is in RAM, may hold every caption there is, and is overwritten."""
        weights = self.weights.on(self.device)
        if self.following is not None:
            self.following.announce()
        result: tuple = ()
        for chunk in hidden.split(BATCH):
            own_mask = None if mask is None else mask[: len(chunk)].to(self.device)
            arguments = (chunk.to(self.device), own_mask, bias, *rest)
            result = functional_call(self.block, weights, arguments, keywords)
            chunk.copy_(result[0])
            bias = result[1]
        return (hidden, bias, *result[2:])


class NormInPlace(nn.Module):
    """T5's last normalisation, a few captions at a time: it works in fp32, and twice."""

    def __init__(self, norm: nn.Module, device: torch.device):
        super().__init__()
        self.norm = norm
        self.device = device

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, L, D) in RAM, overwritten."""
        weights = {name: value.to(self.device) for name, value in self.norm.named_parameters()}
        for chunk in hidden.split(BATCH):
            chunk.copy_(functional_call(self.norm, weights, (chunk.to(self.device),)))
        return hidden


def load_t5(
    reader: Reader, config: dict, device: torch.device | str, dtype: torch.dtype, precision: str | None = None
) -> Any:
    """A frozen `T5EncoderModel` that takes ids and gives embeddings in RAM, and computes on `device`.

    Call it without gradients. precision: 'int8', 'fp8' or 'nf4' to compute with what those leave of the weights.
    """
    from transformers import T5Config, T5EncoderModel

    device, source = torch.device(device), T5Reader(reader)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    load_strictly(model, source, "cpu", dtype, leave=(LAYERS,))
    model.tie_weights()
    blocks = model.encoder.block
    mapped = [_mapped(block, source, f"{LAYERS}{index}.", dtype, precision) for index, block in enumerate(blocks)]
    for index, block in enumerate(blocks):
        following = mapped[index + 1] if index + 1 < len(mapped) else None
        blocks[index] = LayerByLayer(block, mapped[index], following, device)
    model.encoder.final_layer_norm = NormInPlace(model.encoder.final_layer_norm, device)
    return model.eval().requires_grad_(False)


def _mapped(
    block: nn.Module, source: T5Reader, prefix: str, dtype: torch.dtype, precision: str | None
) -> MappedWeights:
    linears = frozenset(f"{path}.weight" for path, module in block.named_modules() if type(module) is nn.Linear)
    names = tuple(name for name, _ in block.named_parameters())
    return MappedWeights(source, prefix, names, linears, dtype, precision)
