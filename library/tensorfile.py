"""Safetensors files: read their headers without torch, write them atomically, hash their data.

The header says every tensor's dtype, shape and byte range, so sizes and layouts are known before a weight is read.
Format: 8 bytes little-endian header length, JSON header, data. https://github.com/huggingface/safetensors#format
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import atomic_write, sha256_file

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class TensorFileError(UserError):
    """A file that is not a whole, well-formed safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors dtype name, shape, and its bytes [begin, end) counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Number of values; 1 for a 0-dim tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its tensors by name, its metadata, and where the data region starts."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path | str) -> Header:
    """Read and check the header of ``path``.

    Raises TensorFileError if the file is truncated, is no safetensors file, or its byte ranges do not tile the data.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length_bytes = file.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise TensorFileError(f"{path} is not a whole safetensors file ({size} bytes)")
            raw = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TensorFileError(f"cannot read {path} as safetensors: {error}") from error
    return _checked_header(path, raw, 8 + length, size)


def _checked_header(path: Path, raw: object, data_start: int, size: int) -> Header:
    if not isinstance(raw, dict):
        raise TensorFileError(f"{path}: the safetensors header is not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{path}: the safetensors metadata must map names to strings")
    tensors = {}
    try:
        for name, entry in raw.items():
            begin, end = entry["data_offsets"]
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + begin, data_start + end)
            width = DTYPE_BYTES.get(info.dtype)
            if width is not None and info.num_elements * width != end - begin:
                raise TensorFileError(f"{path}: tensor {name} has {end - begin} bytes, not {info.num_elements * width}")
            tensors[name] = info
    except (KeyError, TypeError, ValueError) as error:
        raise TensorFileError(f"{path}: malformed safetensors header: {error!r}") from error
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            raise TensorFileError(f"{path}: the tensors' byte ranges overlap or leave holes at byte {position}")
        position = info.end
    if position != size:
        raise TensorFileError(f"{path}: truncated or overlong: {size} bytes, its header describes {position}")
    return Header(tensors, metadata, data_start)


def save_tensors(path: Path | str, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` (made contiguous, on the CPU) and ``metadata`` to ``path`` atomically.

    Raises DiskError when the disk is full, read-only or not ours.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda temporary: _save(plain, temporary, metadata))


def _save(tensors: "dict[str, torch.Tensor]", path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))  # its only word for what the system said
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def data_hash(path: Path | str) -> str:
    """Hex SHA-256 of the data region of ``path`` (everything after the header): independent of metadata."""
    return sha256_file(path, read_header(path).data_start)
