"""What a source yields: the files or table cells that make up one item, not opened yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from library.files import FileStat


class Blob(Protocol):
    """Bytes somewhere. name: for people. key: what the cache remembers it by."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def streams(self) -> bool:
        """Whether it had better be read in the order in which it was listed."""
        ...

    def stat(self) -> FileStat | None:
        """What tells cheaply that the bytes may have changed; None if only the key does."""
        ...

    def read(self) -> bytes:
        """All bytes. Raises OSError."""
        ...


@dataclass(frozen=True)
class FileBlob:
    """A file. ``root`` is the folder the user named; reports show what is below it, and its own name."""

    path: Path
    root: Path

    @property
    def name(self) -> str:
        if self.path.is_relative_to(self.root):
            return f"{self.root.name}/{self.path.relative_to(self.root).as_posix()}"
        return str(self.path)

    @property
    def key(self) -> str:
        return str(self.path)

    @property
    def streams(self) -> bool:
        return False

    def stat(self) -> FileStat:
        return FileStat.of(self.path)

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Record:
    """One item as its source names it. key: unique in its subset, the same wherever the data set lies.

    captions: texts given beside the images (a table's column); None if there is no such column.
    caption_file: where its caption was found; None if there is none.
    """

    key: str
    source: Blob
    target: Blob | None = None
    mask: Blob | None = None
    captions: tuple[str, ...] | None = None
    caption_file: Path | None = None
