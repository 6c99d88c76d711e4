"""Put a transformer's weights straight from the mapped file to their precision and place, one tensor at a time.

No step holds more than the tensor at hand beside what stays: a resident weight is encoded on its device, a streamed
one goes into its block's flat (page-locked) host buffer, modulation weights may stay in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.memory.attention import Attention
from library.memory.host import host_buffer
from library.memory.linear import Linear
from library.memory.precision import PLAIN_DTYPES, QUANTISED, STORAGES, is_quantised, make_storage
from library.memory.storage import Layout, Tensors
from library.memory.stream import HostBlock, Streamer, flat_bytes, flat_views, spread
from library.models.checkpoint_file import TransformerFile
from library.models.flux import FluxTransformer
from library.models.keymap import Entry
from library.models.quantized import QuantizedFile


@dataclass(frozen=True)
class Residence:
    """In which precision the frozen base is kept, and where.

    precision: 'bf16', 'fp16', 'fp32', 'int8', 'fp8' or 'nf4'; the kept modules have the activations' dtype.
    keep: patterns of modules that stay unquantised, beyond the built-in table.
    blocks_to_swap: how many blocks are streamed from host memory. ring: how many the device holds at once.
    modulation_on_cpu: modulation and the embedders it depends on stay in host memory and compute there.
    """

    precision: str = "bf16"
    arithmetic: bool = False
    keep: tuple[str, ...] = ()
    blocks_to_swap: int = 0
    ring: int = 2
    pin: bool = True
    modulation_on_cpu: bool = False

    def precision_of(self, path: str, dtype: torch.dtype) -> tuple[str, torch.dtype]:
        """(storage, dtype of the plain form) for the linear at this path, with activations in `dtype`."""
        if self.precision in QUANTISED:
            return (self.precision, dtype) if is_quantised(path, self.keep) else (plain_name(dtype), dtype)
        inside = is_quantised(path)
        return (self.precision, PLAIN_DTYPES[self.precision]) if inside else (plain_name(dtype), dtype)


def plain_name(dtype: torch.dtype) -> str:
    """'bf16' for torch.bfloat16, and so on."""
    return next(name for name, known in PLAIN_DTYPES.items() if known == dtype)


def load_transformer(
    file: TransformerFile | QuantizedFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    residence: Residence | None = None,
    attention: Attention | None = None,
) -> FluxTransformer:
    """The frozen transformer of `file` with activations in `dtype` on `device`.

    file: a TransformerFile, or a QuantizedFile (whose weights are encoded already).
    residence: precision and place of the weights; everything plain in `dtype` on `device` if not given.
    """
    residence = residence or Residence(plain_name(dtype))
    device = torch.device(device)
    with torch.device("meta"):
        model = FluxTransformer(file.shape, dtype=dtype, attention=attention)
    places = Places(model, residence, device)
    for entry in file.entries:
        encoded = file.read_encoded(entry)
        if encoded is None:
            places.put(entry, file.read(entry))
        else:
            places.put_encoded(entry.name.rpartition(".")[0], encoded)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"nothing was loaded into {left[:8]}"
    places.start_streaming()
    return model.eval()


class Places:
    """Where each tensor of a model goes."""

    def __init__(self, model: FluxTransformer, residence: Residence, device: torch.device):
        self.model = model
        self.residence = residence
        self.device = device
        self.modules = dict(model.named_modules())
        self.paths = {id(module): path for path, module in self.modules.items()}
        self.on_cpu = {id(linear) for linear in model.vector_linears()} if residence.modulation_on_cpu else set()
        self.host_blocks: dict[int, HostBlock] = {}
        for index in spread(residence.blocks_to_swap, len(model.blocks())) if residence.blocks_to_swap else []:
            self.host_blocks[index] = self._host_block(model.streamed_linears(index))

    def put(self, entry: Entry, tensor: Tensor) -> None:
        """Bring one tensor of the file to its place."""
        path, _, leaf = entry.name.rpartition(".")
        module = self.modules[path]
        home = torch.device("cpu") if id(module) in self.on_cpu else self.device
        if leaf != "weight" or not isinstance(module, Linear):
            value = tensor.to(device=home, dtype=self.model.dtype, copy=True)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            return
        self._put_weight(module, path, tensor, home)

    def start_streaming(self) -> None:
        """Every tensor is in its place: set up the ring."""
        if self.host_blocks:
            self.model.runner.streamer = Streamer(self.host_blocks, self.device, self.residence.ring)

    def _put_weight(self, linear: Linear, path: str, tensor: Tensor, home: torch.device) -> None:
        precision, dtype = self.residence.precision_of(path, self.model.dtype)
        quantised = precision in QUANTISED
        # Quantisation is fastest on the device, even if the result goes back to host memory.
        tensor = tensor.to(device=self.device if quantised else home)
        if linear.storage is None and not quantised:
            linear.weight = nn.Parameter(tensor.to(dtype=dtype, copy=tensor.device.type == "cpu"), requires_grad=False)
            return
        self.put_encoded(path, STORAGES[precision].encode(tensor, self._layout(linear, path)))

    def put_encoded(self, path: str, encoded: Tensors) -> None:
        """Bring the stored form of a linear's weight to its place."""
        linear = self.modules[path]
        if linear.storage is not None:
            for name, value in encoded.items():
                linear.storage.home[name].copy_(value)
            return
        home = torch.device("cpu") if id(linear) in self.on_cpu else self.device
        encoded = {name: value.to(home, copy=value.device.type == "cpu") for name, value in encoded.items()}
        precision, _ = self.residence.precision_of(path, self.model.dtype)
        linear.set_storage(make_storage(precision, shape_of(linear), encoded, self.residence.arithmetic))

    def _layout(self, linear: Linear, path: str) -> Layout:
        precision, dtype = self.residence.precision_of(path, self.model.dtype)
        return STORAGES[precision].layout(shape_of(linear), dtype)

    def _host_block(self, linears: list[Linear]) -> HostBlock:
        """A block's flat buffer, with its linears' storages laid out in it (still empty)."""
        paths = [self.paths[id(linear)] for linear in linears]
        layouts = [self._layout(linear, path) for linear, path in zip(linears, paths)]
        buffer = host_buffer(flat_bytes(layouts), self.residence.pin)
        for linear, path, tensors in zip(linears, paths, flat_views(buffer, layouts)):
            precision, _ = self.residence.precision_of(path, self.model.dtype)
            linear.set_storage(make_storage(precision, shape_of(linear), tensors, self.residence.arithmetic))
        return HostBlock([linear.storage for linear in linears], buffer)


def shape_of(linear: Linear) -> tuple[int, int]:
    """(out, in) of a linear, whether or not it holds a weight."""
    return linear.out_features, linear.in_features
