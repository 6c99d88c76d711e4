"""Where items come from: folders paired by file name here, tables in library.data.tables, data sets in library.data.hub.

A source yields records; it opens no image. What is left over (stray files, targets without a source) is said, what is
missing is reported with everything else that is bad.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from library.config.tables import SubsetTable
from library.data.images import EXTENSIONS
from library.data.records import FileBlob, Record
from library.data.report import Report

KNOWN_NEIGHBOURS = frozenset({".txt", ".caption", ".json", ".jsonl", ".csv", ".toml", ".md", ".npz", ".safetensors"})


def records(subset: SubsetTable, report: Report) -> list[Record]:
    """All records of a subset, in the order of their keys. Problems go to ``report``."""
    if subset.dataset_name is not None:
        from library.data.hub import hub_records

        return hub_records(subset, report)
    if subset.metadata_file is not None:
        from library.data.tables import table_records

        return list(table_records(subset, subset.metadata_file, report))
    if subset.image_dir is None:
        report.bad("a subset", "names neither image_dir, metadata_file nor dataset_name")
        return []
    return list(_folder_records(subset, subset.image_dir, report))


def list_images(folder: Path, recursive: bool, report: Report) -> dict[str, list[Path]]:
    """Images below ``folder`` by stem ("a", or "below/a"), in order. Whatever else lies there is ignored, and said."""
    found: dict[str, list[Path]] = {}
    if not folder.is_dir():
        report.bad(str(folder), "no such folder" if not folder.exists() else "not a folder")
        return found
    strays = []
    for path in _files(folder, recursive, strays):
        if path.suffix.lower() in EXTENSIONS:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(stem, []).append(path)
        elif path.suffix.lower() not in KNOWN_NEIGHBOURS:
            strays.append(path.name)
    if strays:
        some = ", ".join(sorted(strays)[:5]) + (", ..." if len(strays) > 5 else "")
        report.notice(f"{folder.name}: ignored {len(strays)} that are no images ({some})")
    return dict(sorted(found.items()))


def _files(folder: Path, recursive: bool, strays: list[str]) -> Iterator[Path]:
    """Regular files in name order; folders are entered if ``recursive``, never twice through links."""
    pending, entered = [folder], set()
    while pending:
        current = pending.pop(0)
        real = current.resolve()
        if real in entered:
            strays.append(f"{current.name} (a loop of links)")
            continue
        entered.add(real)
        for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
            path = Path(entry.path)
            try:
                mode = path.stat().st_mode
            except OSError:
                strays.append(f"{entry.name} (a broken link)")
                continue
            if stat.S_ISREG(mode):
                yield path
            elif stat.S_ISDIR(mode) and recursive:
                pending.append(path)
            elif path.suffix.lower() in EXTENSIONS:
                strays.append(f"{entry.name} (not a file)")


def single(stem: str, paths: list[Path], report: Report) -> Path | None:
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        report.bad(f"{paths[0].parent.name}/{stem}", f"{len(paths)} images of one name ({names}): keep one")
        return None
    return paths[0]


def _partners(
    folder: Path | None, suffix: str | None, here: Path, recursive: bool, report: Report
) -> dict[str, list[Path]]:
    """The images of a role by the item's stem: from their own folder, or by their suffix from the images' folder."""
    if folder is None and suffix is None:
        return {}
    images = list_images(folder or here, recursive, report)
    if suffix is None:
        return images
    return {stem.removesuffix(suffix): paths for stem, paths in images.items() if stem.endswith(suffix)}


def _folder_records(subset: SubsetTable, folder: Path, report: Report) -> Iterator[Record]:
    images = list_images(folder, subset.recursive, report)
    targets = _partners(subset.target_dir, subset.target_suffix, folder, subset.recursive, report)
    masks = _partners(subset.mask_dir, subset.mask_suffix, folder, subset.recursive, report)
    sources = _sources(subset, images)
    if folder.is_dir() and not sources:
        ending = f" whose name ends in {subset.source_suffix}" if subset.source_suffix else ""
        report.bad(str(folder), f"no images{ending}")
    if subset.caption_dir is not None and not subset.caption_dir.is_dir():
        report.bad(str(subset.caption_dir), "no such folder (caption_dir)")
    for role, partners, home in (("target", targets, subset.target_dir), ("mask", masks, subset.mask_dir)):
        _say_left_over(role, sorted(set(partners) - set(sources)), home or folder, report)
    for stem, paths in sources.items():
        source = single(stem, paths, report)
        target = single(stem, targets[stem], report) if stem in targets else None
        mask = single(stem, masks[stem], report) if stem in masks else None
        if source is None or (target is None and stem in targets) or (mask is None and stem in masks):
            continue
        yield Record(
            stem,
            FileBlob(source, folder),
            target and FileBlob(target, subset.target_dir or folder),
            mask and FileBlob(mask, subset.mask_dir or folder),
            caption_file=caption_file(subset, stem, source, target),
        )


def _sources(subset: SubsetTable, images: dict[str, list[Path]]) -> dict[str, list[Path]]:
    if subset.source_suffix is not None:
        ending = subset.source_suffix
        return {stem.removesuffix(ending): paths for stem, paths in images.items() if stem.endswith(ending)}
    others = [
        suffix
        for suffix, home in ((subset.target_suffix, subset.target_dir), (subset.mask_suffix, subset.mask_dir))
        if suffix is not None and home in (None, subset.image_dir)
    ]
    return {stem: paths for stem, paths in images.items() if not stem.endswith(tuple(others))} if others else images


def _say_left_over(role: str, stems: list[str], folder: Path, report: Report) -> None:
    if stems:
        some = ", ".join(stems[:5]) + (", ..." if len(stems) > 5 else "")
        report.notice(f"{folder.name}: {len(stems)} {role}s belong to no image ({some})")


def caption_file(subset: SubsetTable, stem: str, source: Path, target: Path | None) -> Path | None:
    """The first caption file there is: named as the item, as the source, or as the target; below caption_dir in the
    folder that the item lies in."""
    home = subset.caption_dir or source.parent
    names = [stem, *(Path(stem).with_name(path.stem) for path in (source, target) if path)]
    for name in names:
        base = home / (name if subset.caption_dir else Path(name).name)
        path = base.with_name(base.name + subset.caption_extension)
        if path.is_file():
            return path
    return None
