"""The sources as they were when they were cached, and what has become of them since.

The trainer looks at every start, so it asks the file system for stats and names alone; a file is read only where its
stat differs. Sources that are not there at all are no change: a cache can be moved to another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from library.config.tables import DatasetTable, SubsetTable
from library.data.images import EXTENSIONS
from library.files import FileStat, sha256_file

SourceFile = Sequence
"""A source file as it was when it was cached: size, mtime ns, ctime ns, inode, sha256 ("" where it is a large table,
which counts as changed by size and time). No class: there may be hundreds of thousands, read at every start."""
LIBRARY_CACHE = "cache-"  # what the `datasets` library leaves beside its own files


class SourceFolder(NamedTuple):
    """A folder that items come from. endings: which files count (all, if none); names: relative, of such files."""

    path: str
    recursive: bool
    endings: Sequence[str]
    names: Sequence[str]


@dataclass(frozen=True)
class Footprint:
    """files: by path. folders: with the names in them (in a manifest: only of those that are not in files)."""

    files: Mapping[str, SourceFile] = field(default_factory=dict)
    folders: Sequence[SourceFolder] = ()


def source_file(stat: FileStat, sha256: str) -> SourceFile:
    """A source file for the manifest."""
    return [stat.size, stat.mtime_ns, stat.ctime_ns, stat.inode, sha256]


def read_file(path: Path) -> SourceFile:
    """A source file with its hash. Raises OSError."""
    stat = FileStat.of(path)
    return source_file(stat, sha256_file(path))


def footprint_of(datasets: Iterable[DatasetTable]) -> Footprint:
    """Tables and folders as they are now: to be taken before they are read, so that a change in between is seen."""
    files: dict[str, SourceFile] = {}
    folders: dict[tuple, SourceFolder] = {}
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        if subset.metadata_file is not None and subset.metadata_file.is_file():
            files[str(subset.metadata_file)] = read_file(subset.metadata_file)
        if subset.dataset_name is not None and os.path.isfile(subset.dataset_name):
            files[subset.dataset_name] = source_file(FileStat.of(subset.dataset_name), "")
        for folder in _folders(subset):
            folders[folder[:3]] = folder
            if subset.dataset_name is not None:
                paths = (os.path.join(folder.path, name) for name in folder.names)
                files |= {path: source_file(FileStat.of(path), "") for path in paths if os.path.isfile(path)}
    return Footprint(files, tuple(folders.values()))


def _folders(subset: SubsetTable) -> Iterator[SourceFolder]:
    if subset.dataset_name is not None:
        if os.path.isdir(subset.dataset_name):
            yield _folder(subset.dataset_name, True, ())
        return
    homes = [subset.caption_dir]
    if subset.metadata_file is None:
        homes += [subset.image_dir, subset.target_dir, subset.mask_dir]
    endings = (*sorted(EXTENSIONS), subset.caption_extension.lower())
    for home in homes:
        if home is not None and home.is_dir():
            yield _folder(str(home), subset.recursive, endings)


def _folder(path: str, recursive: bool, endings: Sequence[str]) -> SourceFolder:
    return SourceFolder(path, recursive, endings, tuple(_names(path, recursive, endings)))


def _names(folder: str, recursive: bool, endings: Sequence[str]) -> Iterator[str]:
    """Names below a folder of files with these endings; no file is looked at."""
    pending, entered = [""], set()
    while pending:
        below = pending.pop()
        place = os.path.join(folder, below) if below else folder
        real = os.path.realpath(place)
        if real in entered:
            continue
        entered.add(real)
        with os.scandir(place) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.name.lower().endswith(tuple(endings)) if endings else _is_data(entry):
                    yield name
                elif recursive and entry.is_dir():
                    pending.append(name)


def _is_data(entry: os.DirEntry) -> bool:
    return entry.is_file() and not entry.name.startswith((LIBRARY_CACHE, "."))


def without(folders: Sequence[SourceFolder], files: Mapping[str, SourceFile]) -> tuple[SourceFolder, ...]:
    """The folders with the names of those files alone that are not listed already."""
    return tuple(
        folder._replace(names=[name for name in folder.names if os.path.join(folder.path, name) not in files])
        for folder in folders
    )


def changes(kept: Footprint) -> Iterator[str]:
    """What is no longer as it was when it was cached, one line each."""
    inhabited: dict[str, bool] = {}
    for path, cached in kept.files.items():
        try:
            if _has_changed(path, cached):
                yield f"{path} has changed"
        except OSError:
            home = os.path.dirname(path)
            if home not in inhabited:
                inhabited[home] = _is_inhabited(home)
            if inhabited[home]:
                yield f"{path} is gone"
    for folder in kept.folders:
        yield from _added(folder, kept.files)


def _has_changed(path: str, cached: SourceFile) -> bool:
    stat = FileStat.of(path)
    if not cached[-1]:
        return [stat.size, stat.mtime_ns] != list(cached[:2])
    return source_file(stat, cached[-1]) != list(cached) and sha256_file(path) != cached[-1]


def _is_inhabited(folder: str) -> bool:
    """Whether there is anything in a folder. An emptied one (or a disk that is not mounted) is as good as absent."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _added(folder: SourceFolder, files: Mapping[str, SourceFile]) -> Iterator[str]:
    try:
        known = set(folder.names)
        paths = (os.path.join(folder.path, name) for name in _names(*folder[:3]) if name not in known)
        yield from (f"{path} is new" for path in sorted(path for path in paths if path not in files))
    except OSError:
        return
