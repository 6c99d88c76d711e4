"""Checkpoint files as named tensors that are read one at a time from the mapped file.

A reader knows names, shapes and byte sizes from headers alone. `read` maps one tensor, so that loading a 24 GB file
never holds more than the tensor at hand.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import ModelError
from library.tensorfile import Header, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reader:
    """Named tensors of one checkpoint."""

    source: str
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored. The caller converts it, and never writes to it: it may be the mapped file."""
        raise NotImplementedError

    def read_to(self, name: str, device: torch.device | str) -> Tensor:
        """The same on a device: it crosses in its stored dtype."""
        return self.read(name).to(device)

    def will_need(self, names: Iterable[str]) -> None:
        """A hint that these are read soon, so that the disk can begin; does nothing where that is not known."""

    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        raise NotImplementedError


class SafetensorsReader(Reader):
    """One safetensors file, or several shards of one."""

    def __init__(self, files: Iterable[Path], source: str):
        self.source = source
        self.files = [Path(file) for file in files]
        self.headers: dict[Path, Header] = {file: read_header(file) for file in self.files}
        self.where = {name: file for file, header in self.headers.items() for name in header.tensors}
        self.shapes = {n: info.shape for header in self.headers.values() for n, info in header.tensors.items()}
        self.dtypes = {n: info.dtype for header in self.headers.values() for n, info in header.tensors.items()}
        self._maps: dict[Path, mmap.mmap] = {}

    def metadata(self) -> dict[str, str]:
        """The metadata of the first file."""
        return self.headers[self.files[0]].metadata

    def num_bytes(self) -> int:
        return sum(info.end - info.begin for header in self.headers.values() for info in header.tensors.values())

    def read(self, name: str) -> Tensor:
        import torch

        file = self.where[name]
        info = self.headers[file].tensors[name]
        if not info.num_elements:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype, name, self.source))
        data = memoryview(self._mapped(file))[info.begin : info.end]
        dtype = torch_dtype(info.dtype, name, self.source)
        if info.begin % max(1, dtype.itemsize):
            data = bytearray(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(data, dtype=dtype).reshape(info.shape)

    def will_need(self, names: Iterable[str]) -> None:
        advice = getattr(mmap, "MADV_WILLNEED", None)  # Windows has none
        if advice is None:
            return
        for name in names:
            info = self.headers[self.where[name]].tensors[name]
            begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
            if info.end > info.begin:
                self._mapped(self.where[name]).madvise(advice, begin, info.end - begin)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            # Read-only: a writable private mapping counts as memory, and a file larger than the RAM is then refused.
            with open(file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


class GgufReader(Reader):
    """A GGUF file; tensors come out dequantised to float32 (the package's own arithmetic), plain ones as stored."""

    def __init__(self, file: Path, source: str):
        from gguf import GGUFReader

        self.source = source
        self.files = [Path(file)]
        try:
            opened = GGUFReader(file)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"cannot read {file} as GGUF: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in opened.tensors}
        self.shapes = {name: _gguf_shape(opened, tensor) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def num_bytes(self) -> int:
        return sum(int(tensor.n_bytes) for tensor in self._tensors.values())

    def read(self, name: str) -> Tensor:
        import torch
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy()).reshape(self.shapes[name])


def _gguf_shape(opened, tensor) -> tuple[int, ...]:
    """GGUF counts dimensions from the fastest; converters note a shape that they had to flatten."""
    noted = opened.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if noted is not None:
        return tuple(int(noted.parts[index][0]) for index in noted.data)
    return tuple(int(size) for size in reversed(tensor.shape))


class Renamed(Reader):
    """Another reader's tensors under other names, some of them reshaped."""

    def __init__(self, reader: Reader, names: dict[str, str], shapes: dict[str, tuple[int, ...]] | None = None):
        self.reader = reader
        self.source = reader.source
        self.files = reader.files
        self.names = names
        reshaped = shapes or {}
        self.shapes = {new: reshaped.get(new, reader.shapes[old]) for new, old in names.items()}
        self.dtypes = {new: reader.dtypes[old] for new, old in names.items()}

    def num_bytes(self) -> int:
        return self.reader.num_bytes()

    def read(self, name: str) -> Tensor:
        return self.reader.read(self.names[name]).reshape(self.shapes[name])

    def read_to(self, name: str, device: torch.device | str) -> Tensor:
        return self.reader.read_to(self.names[name], device).reshape(self.shapes[name])

    def will_need(self, names: Iterable[str]) -> None:
        self.reader.will_need([self.names[name] for name in names])


def torch_dtype(name: str, tensor: str, source: str):
    """The torch dtype of a safetensors dtype name."""
    import torch

    table = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
        "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    if name not in table:
        raise ModelError(f"{source}: tensor {tensor} has the dtype {name}, which InFlux does not read")
    return table[name]


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one component folder: `stem.safetensors`, or the shards its index names.

    `variant` (as 'fp16') prefers `stem.fp16.safetensors`, where a component has it. Raises ModelError if there is
    neither, and points out pickle files, which are never loaded.
    """
    if variant:
        found = weight_files_of(folder, stem, f".{variant}")
        if found:
            return found
    found = weight_files_of(folder, stem, "")
    if found:
        return found
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({', '.join(pickles)} would run code when loaded: convert to safetensors)" if pickles else ""
    raise ModelError(f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json{hint}")


def weight_files_of(folder: Path, stem: str, infix: str) -> list[Path]:
    """The single file or the shards with this infix; [] if there is neither."""
    single = folder / f"{stem}{infix}.safetensors"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {index.name} names {', '.join(missing)}, which {_is_are(missing)} not there")
        return [folder / name for name in names]
    return []


def _is_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
