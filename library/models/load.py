"""Put a transformer's weights straight from the mapped file to their precision and device, one tensor at a time."""

from __future__ import annotations

import torch
from torch import nn

from library.memory.attention import Attention
from library.memory.linear import Linear
from library.models.checkpoint_file import TransformerFile
from library.models.flux import FluxTransformer


def load_transformer(
    file: TransformerFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Attention | None = None,
) -> FluxTransformer:
    """The transformer of `file` with activations (and unquantised weights) in `dtype` on `device`, frozen."""
    with torch.device("meta"):
        model = FluxTransformer(file.shape, dtype=dtype, attention=attention)
    modules = dict(model.named_modules())
    for entry in file.entries:
        path, _, leaf = entry.name.rpartition(".")
        tensor = file.read(entry).to(device=device, dtype=dtype, copy=True)
        _place(modules[path], leaf, tensor)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def _place(module: nn.Module | Linear, leaf: str, tensor: torch.Tensor) -> None:
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
