"""The cache folder: shards of safetensors that describe themselves, and an index that only saves reading them.

The shards are the truth. Each is written whole or not at all, holds up to 256 image entries of one size (64 captions),
and carries every entry's facts and checksum in its header; index.json can be deleted. docs/cache_format.md is the law.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from library.data.bulk import read_json
from library.errors import CacheError
from library.files import atomic_write, disk_error, sweep_leftovers
from library.tensorfile import TensorFileError, read_header, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_NAME = "influx-cache"
FORMAT_VERSION = 1
IMAGES_PER_SHARD = 256
TEXTS_PER_SHARD = 64
SHARD_BYTES = 256 << 20  # entries of large pictures make smaller shards, so that a kill loses little
INDEX = "index.json"
MANIFESTS = "manifests"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Entry:
    """One encoded entry: its tensors by name, and facts about it (JSON) that travel in the header."""

    fingerprint: str
    tensors: dict[str, Tensor]
    facts: dict

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Shard:
    """A shard as the index knows it, and when it was written."""

    size: int
    fingerprints: tuple[str, ...]
    mtime_ns: int = 0


class Store:
    """What is in a cache folder. Opening reads the index and looks at the shards' sizes; no tensor is read."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.shards: dict[str, Shard] = {}
        self.broken: dict[str, str] = {}
        self.where: dict[str, str] = {}
        self._refresh(_read_index(self.folder / INDEX))

    def _refresh(self, indexed: dict[str, Shard]) -> None:
        """Take the index's word for shards of the size it says; read the headers of all others."""
        for name, stat in _shard_files(self.folder):
            shard = indexed.get(name)
            if shard is not None and shard.size == stat.st_size:
                fingerprints = shard.fingerprints
            else:
                try:
                    fingerprints = tuple(entry_facts(self.folder / name))
                except TensorFileError as error:
                    self.broken[name] = str(error)
                    continue
            self.shards[name] = Shard(stat.st_size, fingerprints, stat.st_mtime_ns)
        for name, shard in sorted(self.shards.items(), key=lambda entry: (entry[1].mtime_ns, entry[0])):
            self.where.update(dict.fromkeys(shard.fingerprints, name))  # of two, the newer

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self.where

    def bucket(self, fingerprint: str) -> tuple[int, int]:
        """Width and height of an image entry, from its shard's folder."""
        width, height = self.where[fingerprint].split("/")[1].split("x")
        return int(width), int(height)

    def add(self, kind: str, bucket: tuple[int, int] | None, entries: list[Entry]) -> None:
        """Write entries as one new shard. kind: "image" (of one bucket) or "text"."""
        group = f"{kind}/{bucket[0]}x{bucket[1]}" if bucket is not None else kind
        name = f"{group}/{os.urandom(8).hex()}.safetensors"
        tensors, facts = {}, {}
        for entry in entries:
            _refuse_nonfinite(entry)
            tensors |= {f"{entry.fingerprint}/{part}": tensor for part, tensor in entry.tensors.items()}
            facts[entry.fingerprint] = {**entry.facts, "sha256": checksum(entry.tensors)}
        metadata = {"format": FORMAT_NAME, "version": str(FORMAT_VERSION), "kind": kind, "entries": json.dumps(facts)}
        path = self.folder / name
        save_tensors(path, tensors, metadata)
        self.shards[name] = Shard(path.stat().st_size, tuple(facts), path.stat().st_mtime_ns)
        for fingerprint in facts:
            self.where[fingerprint] = name

    def reload(self) -> None:
        """Look at the folder again: other processes may have written shards."""
        known = dict(self.shards)
        self.shards, self.broken, self.where = {}, {}, {}
        self._refresh(known)

    def save_index(self) -> None:
        """Write the index of what is there."""
        shards = {name: [shard.size, *shard.fingerprints] for name, shard in sorted(self.shards.items())}
        content = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "shards": shards}
        atomic_write(self.folder / INDEX, json.dumps(content, separators=(",", ":")))

    def forget(self, fingerprints: set[str]) -> None:
        """No longer count on these entries, so that they are encoded again (into new shards)."""
        for fingerprint in fingerprints:
            self.where.pop(fingerprint, None)

    def set_aside(self, name: str) -> None:
        """Take a damaged shard out of use without deleting it."""
        path = self.folder / name
        os.replace(path, path.with_suffix(DAMAGED))
        self.shards.pop(name, None)
        self.broken.pop(name, None)

    def remove(self, name: str) -> None:
        """Delete a shard."""
        (self.folder / name).unlink()
        self.shards.pop(name, None)
        self.broken.pop(name, None)

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Be the only process that writes here; waits for another one, and says for whom.

        The lock is the operating system's: it is gone with the process that held it, however that died.
        """
        owner = self.folder / ".lock-owner"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"waiting: {_owner(owner)} is writing to {self.folder}")
                lock.acquire()
        except OSError as error:
            raise disk_error(error, self.folder) from error
        try:
            atomic_write(owner, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}")
            for group in (self.folder, *(self.folder / name for name in (MANIFESTS, *_groups(self.folder)))):
                sweep_leftovers(group)
            self.reload()
            yield
        finally:
            lock.release()


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of an entry's tensors: their bytes in the order of their names."""
    import torch

    total = sha256()
    for _, tensor in sorted(tensors.items()):
        total.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def _refuse_nonfinite(entry: Entry) -> None:
    for part, tensor in entry.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CacheError(
                f"{entry.facts.get('name', entry.fingerprint)}: encoding gave NaN or infinite values in {part}; "
                'try vae_dtype = "fp32" or t5xxl_precision = "bf16"'
            )


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return "another process"


def _groups(folder: Path) -> list[str]:
    """The folders below it that hold shards, whether there are any in them yet."""
    groups = ["text"]
    with contextlib.suppress(OSError):
        groups += sorted(f"image/{entry.name}" for entry in os.scandir(folder / "image") if entry.is_dir())
    return groups


def _shard_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative name and stat of every shard below the folder."""
    for group in _groups(folder):
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.scandir(folder / group), key=lambda entry: entry.name):
                if entry.name.endswith(".safetensors") and entry.is_file():
                    yield f"{group}/{entry.name}", entry.stat()


def _read_index(path: Path) -> dict[str, Shard]:
    try:
        content = read_json(path)
        if content["version"] != FORMAT_VERSION:
            return {}
        return {name: Shard(size, tuple(rest)) for name, (size, *rest) in content["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def entry_facts(path: Path) -> dict[str, dict]:
    """The facts of all entries of a shard by fingerprint. Raises TensorFileError if it is not a whole shard."""
    header = read_header(path)
    try:
        if header.metadata["format"] != FORMAT_NAME or int(header.metadata["version"]) != FORMAT_VERSION:
            raise TensorFileError(f"{path} is no shard of this cache format")
        facts = json.loads(header.metadata["entries"])
    except (KeyError, ValueError) as error:
        raise TensorFileError(f"{path} is no shard of a cache: {error!r}") from error
    present = {name.split("/", 1)[0] for name in header.tensors}
    if present != set(facts):
        raise TensorFileError(f"{path}: its header lists other entries than its tensors")
    return facts
