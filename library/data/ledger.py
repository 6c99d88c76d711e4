"""What is already known about files: their hashes and what a decode showed, by path and stat.

An unchanged file is neither read nor decoded again. The ledger lies in the cache folder and may be lost without harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from library.data.bulk import read_json
from library.data.images import BadImage, ImageFacts, inspect
from library.data.records import Blob
from library.files import FileStat, atomic_write

VERSION = 2


@dataclass(frozen=True)
class Known:
    """A file as it was when it was last read."""

    stat: FileStat | None
    sha256: str
    facts: ImageFacts


class Ledger:
    """Known files by key. ``rehash`` reads every file again, whatever its stat says."""

    def __init__(self, path: Path):
        self._path = path
        self._files: dict[str, Known] = {}
        self._saved = True
        try:
            content = read_json(path)
            if content["version"] == VERSION:
                self._files = {key: _known(value) for key, value in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            self._files = {}

    def look(
        self,
        blobs: Iterable[Blob],
        max_pixels: int,
        *,
        workers: int = 1,
        rehash: bool = False,
        progress: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Known | BadImage]:
        """What is known about each blob, by key; a BadImage if it cannot be used."""
        found: dict[str, Known | BadImage] = {}
        unseen: dict[str, Blob] = {}
        for blob in blobs:
            if blob.key in found or blob.key in unseen:
                continue
            known = None if rehash else self._fresh(blob, max_pixels)
            if known is None:
                unseen[blob.key] = blob
            else:
                found[blob.key] = known
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for key, result in zip(
                unseen, pool.map(lambda blob: _read(blob, max_pixels), unseen.values()), strict=True
            ):
                found[key] = result
                progress(1)
                if isinstance(result, Known):
                    self._files[key] = result
                    self._saved = False
        return found

    def _fresh(self, blob: Blob, max_pixels: int) -> Known | None:
        known = self._files.get(blob.key)
        if known is None or known.facts.width * known.facts.height > max_pixels:
            return None
        try:
            return known if known.stat == blob.stat() else None
        except OSError:
            return None

    def save(self) -> None:
        """Write what is new."""
        if not self._saved:
            files = {key: _plain(known) for key, known in self._files.items()}
            atomic_write(self._path, json.dumps({"version": VERSION, "files": files}, separators=(",", ":")))
            self._saved = True


def _read(blob: Blob, max_pixels: int) -> Known | BadImage:
    try:
        stat = blob.stat()
        data = blob.read()
        return Known(stat, sha256(data).hexdigest(), inspect(data, max_pixels))
    except OSError as error:
        return BadImage(f"cannot be read ({error.strerror or error})")
    except BadImage as error:
        return error


def _plain(known: Known) -> list:
    stat, facts = known.stat, known.facts
    values = None if stat is None else [stat.size, stat.mtime_ns, stat.ctime_ns, stat.inode]
    shape = [facts.width, facts.height, facts.has_alpha, facts.white, facts.opaque, facts.notices]
    return [values, known.sha256, *shape]


def _known(value: list) -> Known:
    stat, digest, width, height, has_alpha, white, opaque, notices = value
    facts = ImageFacts(width, height, has_alpha, white, opaque, tuple(notices))
    return Known(None if stat is None else FileStat(*stat), digest, facts)
