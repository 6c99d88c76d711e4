"""A network's file looked at without torch: names, shapes, and values only where a question needs them.

What `--dry_run` and the training command ask before weights are loaded is answered here, by the same reading of names
as loading a file for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import NetworkFileError
from library.networks.change import Change, read_change
from library.tensorfile import Header, TensorInfo, read_header

if TYPE_CHECKING:
    import numpy

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U64": "<u8",
    "U32": "<u4", "U16": "<u2",
}  # fmt: skip


class Stored:
    """A tensor of a file: its shape is known, its values are read whenever they are asked for."""

    def __init__(self, path: Path, info: TensorInfo):
        self.path, self.info = path, info
        self.shape = info.shape

    def values(self) -> numpy.ndarray:
        """The values, in float32 where the file holds bfloat16; bytes of types that numpy does not know."""
        import numpy

        with open(self.path, "rb") as file:
            file.seek(self.info.begin)
            raw = numpy.frombuffer(file.read(self.info.end - self.info.begin), _NUMPY_TYPES.get(self.info.dtype, "u1"))
        if self.info.dtype == "BF16":
            raw = (raw.astype(numpy.uint32) << 16).view(numpy.float32)
        return raw.reshape(self.shape) if raw.size == self.info.num_elements else raw

    def __float__(self) -> float:
        return float(self.values().reshape(()))

    def __getitem__(self, rows: object) -> numpy.ndarray:
        return self.values()[rows]

    def __mul__(self, scale: float) -> numpy.ndarray:
        return self.values() * scale

    def new_zeros(self, count: int) -> numpy.ndarray:
        """Zeros of a length, as torch's tensors make them."""
        import numpy

        return numpy.zeros(count, numpy.float32)


@dataclass(frozen=True)
class StoredNetwork:
    """A network's file, understood but not loaded. ``unused``: keys of text encoders that InFlux does not apply."""

    path: Path
    change: Change
    metadata: dict[str, str]
    unused: tuple[str, ...] = ()


def network_header(path: Path) -> Header:
    """The header of a network's file. Raises NetworkFileError for what is never loaded or is not there."""
    if path.suffix.lower() in PICKLES:
        raise NetworkFileError(f"{path}: pickled files can run code and are never loaded; convert it to safetensors")
    if not path.is_file():
        raise NetworkFileError(f"there is no network file {path}")
    return read_header(path)


def understood(path: Path, tensors: dict) -> tuple[Change, list[str]]:
    """`read_change`, for a file that must hold a network."""
    change, unused = read_change(tensors, str(path))
    if not change.entries and not change.text and not change.biases:
        raise NetworkFileError(f"{path} holds no network")
    return change, unused


def look(path: Path | str) -> StoredNetwork:
    """Read the names and shapes in ``path``, and that its values are finite. Raises NetworkFileError as loading would.

    A file that has not changed since is not read again.
    """
    path = Path(path)
    network_header(path)
    stat = path.stat()
    return _look(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _look(path: Path, size: int, mtime_ns: int) -> StoredNetwork:
    import numpy

    header = network_header(path)
    tensors = {name: Stored(path, info) for name, info in header.tensors.items()}
    change, unused = understood(path, tensors)
    for name, tensor in tensors.items():
        if not numpy.isfinite(tensor.values()).all():
            raise NetworkFileError(f"{path}: {name} holds NaN or infinity; the training that made it failed")
    return StoredNetwork(path, change, header.metadata, tuple(unused))


def values_of(tensor: object) -> numpy.ndarray:
    """The values of a stored tensor, or of one that was read on the way (a reordered one)."""
    return tensor.values() if isinstance(tensor, Stored) else tensor
