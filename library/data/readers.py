"""Who reads a cache: a trainer says which shards it counts on for as long as it runs, and --gc leaves those alone.

A reader is a locked file in readers/ with its shards beside it. The lock is the operating system's: it is gone with the
process, however that died, so a crashed reader keeps nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from library.files import atomic_write, sweep_leftovers

READERS = "readers"
_GATE = ".gate"  # held while a reader announces itself, and during a whole collection: one never falls into the other


class Reading:
    """This process as a reader of a cache folder, until `close` or its end."""

    def __init__(self, path: Path, lock: FileLock):
        self._path, self._lock = path, lock

    def holds(self, shards: Iterable[str]) -> None:
        """Say which shards are counted on. Before that, all are."""
        content = {"process": os.getpid(), "host": socket.gethostname(), "shards": sorted(set(shards))}
        atomic_write(self._path.with_suffix(".json"), json.dumps(content, indent=1))

    def close(self) -> None:
        """Read no longer."""
        self._lock.release()
        _forget(self._path)


@dataclass(frozen=True)
class Held:
    """Shards that running readers count on. count: readers; everything: one of them has not said yet which."""

    count: int
    shards: frozenset[str]
    everything: bool

    def __contains__(self, shard: str) -> bool:
        return self.everything or shard in self.shards


def begin(folder: Path) -> Reading | None:
    """Announce a reader; waits while the cache is being collected. None for a folder that cannot be written to: who
    can, on another machine, does not know of this one."""
    if not folder.is_dir():
        return None
    path = folder / READERS / f"{os.getpid()}-{os.urandom(4).hex()}.lock"
    lock = FileLock(path, thread_local=False)
    try:
        with _gate(folder):
            lock.acquire(timeout=0)
    except (OSError, NotImplementedError):
        return None
    return Reading(path, lock)


@contextlib.contextmanager
def none_begins(folder: Path) -> Iterator[Held]:
    """What is held now; new readers wait until the block ends. Forgets readers that are no more."""
    with _gate(folder):
        sweep_leftovers(folder / READERS)
        shards: set[str] = set()
        everything, count = False, 0
        for path in (folder / READERS).glob("*.lock"):
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                count += 1
                said = _shards_of(path)
                everything |= said is None
                shards.update(said or ())
            else:
                lock.release()
                _forget(path)
        yield Held(count, frozenset(shards), everything)


def _gate(folder: Path) -> FileLock:
    (folder / READERS).mkdir(exist_ok=True)
    return FileLock(folder / READERS / _GATE)


def _shards_of(path: Path) -> list[str] | None:
    try:
        return list(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _forget(path: Path) -> None:
    for part in (path, path.with_suffix(".json")):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
