"""Tensors out of shards, by positioned reads straight into the memory they are wanted in.

No mapping (a shard truncated under a mapping kills the process) and no copy in between. A shard's header is parsed
once, into a few bytes per entry, so that memory stays flat over any number of epochs.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.store import Store
from library.errors import CacheError
from library.tensorfile import TensorFileError, TensorInfo, read_header

MOST_OPEN_FILES = 128
DTYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What entries of one make-up have in common: names, types and shapes of their tensors."""

    parts: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]


class Reader:
    """Reads entries of a store. Safe to use from several threads."""

    def __init__(self, store: Store):
        self.store = store
        self._places: dict[str, tuple[Layout, np.ndarray]] = {}
        self._layouts: dict[tuple, Layout] = {}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def parts(self, fingerprint: str) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
        """Names of an entry's tensors, with position, dtype and shape."""
        return self._place(fingerprint)[0].parts

    def read(self, fingerprint: str, part: str, out: Tensor | None = None) -> Tensor:
        """One tensor of an entry, into ``out`` (contiguous, of its dtype and shape) if given.

        Raises CacheError if the entry or the shard's bytes are not there.
        """
        layout, offsets = self._place(fingerprint)
        if part not in layout.parts:
            raise CacheError(f"cache entry {fingerprint} has no {part}; it has {', '.join(layout.parts)}")
        column, dtype, shape = layout.parts[part]
        tensor = torch.empty(shape, dtype=dtype) if out is None else out
        assert tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous(), (part, tensor.shape, shape)
        self._fill(self.store.where[fingerprint], int(offsets[column]), tensor)
        return tensor

    def entry(self, fingerprint: str) -> dict[str, Tensor]:
        """All tensors of an entry."""
        return {part: self.read(fingerprint, part) for part in self.parts(fingerprint)}

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()

    def _place(self, fingerprint: str) -> tuple[Layout, np.ndarray]:
        place = self._places.get(fingerprint)
        if place is None:
            name = self.store.where.get(fingerprint)
            if name is None:
                raise CacheError(f"the cache in {self.store.folder} has no entry {fingerprint}: run influx_cache.py")
            with self._lock:
                self._learn(name)
            place = self._places[fingerprint]
        return place

    def _learn(self, name: str) -> None:
        """Note where each entry of a shard has its tensors."""
        try:
            header = read_header(self.store.folder / name)
        except TensorFileError as error:
            raise CacheError(f"{error}; run influx_cache.py to encode its entries again") from error
        entries: dict[str, dict[str, TensorInfo]] = {}
        for key, info in header.tensors.items():
            fingerprint, part = key.split("/", 1)
            entries.setdefault(fingerprint, {})[part] = info
        for fingerprint, infos in entries.items():
            if self.store.where.get(fingerprint) != name:
                continue
            parts = sorted(infos)
            make_up = tuple((part, infos[part].dtype, infos[part].shape) for part in parts)
            layout = self._layouts.get(make_up)
            if layout is None:
                described = {
                    part: (column, DTYPES[dtype], shape) for column, (part, dtype, shape) in enumerate(make_up)
                }
                layout = self._layouts[make_up] = Layout(described)
            self._places[fingerprint] = (layout, np.array([infos[part].begin for part in parts], dtype=np.int64))

    def _fill(self, name: str, offset: int, tensor: Tensor) -> None:
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        done = 0
        with self._lock:
            handle = self._handle(self.store.folder / name, name)
            while done < len(view):
                got = _read_at(handle, view[done:], offset + done)
                if got <= 0:
                    raise CacheError(f"{name} ends too early: run influx_cache.py --verify")
                done += got

    def _handle(self, path: Path, name: str) -> int:
        handle = self._files.get(name)
        if handle is None:
            try:
                handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CacheError(f"{path} cannot be opened ({error.strerror}): run influx_cache.py") from error
            self._files[name] = handle
            if len(self._files) > MOST_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return handle


def _read_at(handle: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [view], offset)
    os.lseek(handle, offset, os.SEEK_SET)
    data = os.read(handle, len(view))
    view[: len(data)] = data
    return len(data)
