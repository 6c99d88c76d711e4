"""From records to pairs: every item has what its mode needs, in shapes that fit, or is reported with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.conditioning import MODES, Mode
from library.config.tables import SubsetTable
from library.data.captions import BadCaption, CaptionSettings, checked, read_captions
from library.data.footprint import SourceFile, read_file
from library.data.geometry import WHOLE, Box, region_size, same_aspect
from library.data.images import BadImage, ImageFacts
from library.data.ledger import Known
from library.data.records import Blob, Record
from library.data.report import Report

LEFT: Box = (0.0, 0.0, 0.5, 1.0)
RIGHT: Box = (0.5, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Picture:
    """A part of an image file: all of it, or one half of a joined canvas."""

    blob: Blob
    known: Known
    region: Box = WHOLE

    @property
    def facts(self) -> ImageFacts:
        return self.known.facts

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        return region_size((self.facts.width, self.facts.height), self.region)

    @property
    def identity(self) -> list:
        """What its pixels are made from."""
        return [self.known.sha256, list(self.region)]


@dataclass(frozen=True)
class Pair:
    """A checked item. mask: a mask file, the source itself if its alpha is the mask, None if drawn or not needed.

    caption_seen: its caption file as it was when it was read.
    """

    key: str
    source: Picture
    target: Picture | None
    mask: Picture | None
    captions: tuple[str, ...]
    caption_file: Path | None = None
    caption_seen: SourceFile | None = None

    @property
    def frame(self) -> tuple[float, float]:
        """Size of the picture that decides scale and crop: what the model is to paint."""
        return (self.target or self.source).size


def is_joined(subset: SubsetTable) -> bool:
    """Whether source and target lie in one file, side by side."""
    apart = (subset.target_dir, subset.target_suffix, subset.target_column)
    return MODES[subset.mode].pictures_across == 2 and all(value is None for value in apart)


def blobs_of(record: Record) -> list[Blob]:
    """All images of a record."""
    return [blob for blob in (record.source, record.target, record.mask) if blob is not None]


def contradictions(subset: SubsetTable) -> list[str]:
    """Settings of a subset that exclude each other or have no effect, in words."""
    mode = MODES[subset.mode]
    found = []
    origins = {
        "mask_dir": subset.mask_dir, "mask_suffix": subset.mask_suffix, "mask_column": subset.mask_column,
        "alpha_mask": subset.alpha_mask or None, "generate_mask": subset.generate_mask or None,
    }  # fmt: skip
    given = [name for name, value in origins.items() if value is not None]
    files = [name for name in given if name.startswith("mask_")]
    if given and "mask" not in mode.takes:
        found.append(f"mode {mode.name} makes its own masks: {' and '.join(given)} cannot act; remove it")
    elif len(set(given) - set(files)) + bool(files) > 1:
        found.append(f"{' and '.join(given)} each say where masks come from: keep one")
    if "mask" in mode.needs and not given and subset.metadata_file is None:
        found.append(f"mode {mode.name} needs masks: set mask_dir, alpha_mask = true or generate_mask = ['box', ...]")
    if "target" in mode.needs and not is_joined(subset) and not _may_have_targets(subset):
        found.append(f"mode {mode.name} needs targets: set target_dir")
    return found


def _may_have_targets(subset: SubsetTable) -> bool:
    apart = (subset.target_dir, subset.target_suffix, subset.target_column, subset.metadata_file)
    return any(value is not None for value in apart)


def pair(
    record: Record,
    name: str,
    subset: SubsetTable,
    known: Mapping[str, Known | BadImage],
    captions: CaptionSettings,
    report: Report,
) -> Pair | None:
    """The checked item of a record, or None after a report of all that is wrong with it."""
    problems: list[tuple[str, str]] = []
    pictures = _pictures(record, known, problems)
    mode = MODES[subset.mode]
    target = pictures.get("target")
    source = pictures.get("image")
    if source is not None and is_joined(subset) and record.target is None:
        source, target = _halves(source)
    elif record.target is None and _wants_target(subset, mode):
        problems.append((record.source.name, f"has no target{_where(subset.target_dir, subset.target_suffix)}"))
    if record.mask is None and _wants_mask_file(subset, mode):
        problems.append((record.source.name, f"has no mask{_where(subset.mask_dir, subset.mask_suffix)}"))
    mask = source if subset.alpha_mask and source is not None else pictures.get("mask")
    if source is not None and not problems:
        problems += _misfits(source, target, mask, subset)
    seen = _seen(record)
    texts = _captions(record, subset, captions, problems)
    for where, reason in problems:
        report.bad(where, reason)
    if problems or source is None or texts is None:
        return None
    _say(source, target, mask, report)
    return Pair(f"{name}/{record.key}", source, target, mask, texts, record.caption_file, seen)


def _pictures(record: Record, known: Mapping[str, Known | BadImage], problems: list) -> dict[str, Picture]:
    pictures = {}
    for role, blob in (("image", record.source), ("target", record.target), ("mask", record.mask)):
        if blob is None:
            continue
        found = known[blob.key]
        if isinstance(found, Known):
            pictures[role] = Picture(blob, found)
        else:
            problems.append((blob.name, str(found)))
    return pictures


def _halves(joined: Picture) -> tuple[Picture, Picture]:
    return Picture(joined.blob, joined.known, LEFT), Picture(joined.blob, joined.known, RIGHT)


def _wants_target(subset: SubsetTable, mode: Mode) -> bool:
    given = (subset.target_dir, subset.target_suffix, subset.target_column)
    return "target" in mode.needs or ("target" in mode.takes and any(value is not None for value in given))


def _wants_mask_file(subset: SubsetTable, mode: Mode) -> bool:
    if subset.alpha_mask or subset.generate_mask or "mask" not in mode.takes:
        return False
    given = (subset.mask_dir, subset.mask_suffix, subset.mask_column)
    return "mask" in mode.needs or any(value is not None for value in given)


def _where(folder, suffix: str | None) -> str:
    place = f" in {folder}" if folder is not None else ""
    return f"{place} (name ending in {suffix})" if suffix else place


def _size(picture: Picture) -> str:
    return f"{picture.size[0]:g}x{picture.size[1]:g}"


def _misfits(
    source: Picture, target: Picture | None, mask: Picture | None, subset: SubsetTable
) -> list[tuple[str, str]]:
    """Images of one item that do not fit each other."""
    found = []
    if target is not None and not same_aspect(source.size, target.size) and subset.size_mismatch == "error":
        found.append(
            (
                source.blob.name,
                f"is {_size(source)}, its target {target.blob.name} is {_size(target)}: another aspect "
                '(size_mismatch = "crop" or "pad" fits the source to the target)',
            )
        )
    if mask is None or mask is source:
        if mask is not None and (not mask.facts.has_alpha or mask.facts.opaque == 1):
            found.append((mask.blob.name, "has no transparent parts, which alpha_mask takes the mask from"))
        return found
    frames = [source.size] + ([target.size] if target is not None else [])
    if not any(same_aspect(mask.size, frame) for frame in frames):
        found.append((mask.blob.name, f"is {_size(mask)}, its image {source.blob.name} is {_size(source)}"))
    empty = mask.facts.white == (1 if subset.invert_mask else 0)
    if empty:
        found.append((mask.blob.name, f"is all {'white' if subset.invert_mask else 'black'}: nothing to repaint"))
    return found


def _seen(record: Record) -> SourceFile | None:
    """The caption file before it is read. One that cannot be is reported when it is."""
    with contextlib.suppress(OSError):
        return read_file(record.caption_file) if record.caption_file is not None else None
    return None


def _captions(
    record: Record, subset: SubsetTable, settings: CaptionSettings, problems: list[tuple[str, str]]
) -> tuple[str, ...] | None:
    try:
        if record.captions is not None:
            return tuple(checked(text, settings) for text in record.captions)
        if record.caption_file is not None:
            return read_captions(record.caption_file, settings)
    except BadCaption as error:
        where = record.caption_file.name if record.caption_file is not None else record.source.name
        problems.append((where, str(error)))
        return None
    except OSError as error:
        problems.append((record.caption_file.name, f"cannot be read ({error.strerror})"))
        return None
    if subset.instance_prompt is not None:
        return (subset.instance_prompt,)
    where = f" in {subset.caption_dir}" if subset.caption_dir is not None else f" ({subset.caption_extension})"
    problems.append((record.source.name, f"has no caption{where} and there is no instance_prompt"))
    return None


def _say(source: Picture, target: Picture | None, mask: Picture | None, report: Report) -> None:
    for picture in (source, target):
        for notice in picture.facts.notices if picture is not None else ():
            if not (notice == "has transparent parts" and mask is source):
                report.notice(f"{picture.blob.name} {notice}")
    if mask is not None and mask is not source:
        if mask.facts.has_alpha:
            report.notice(f"{mask.blob.name}: a mask with an alpha channel; its colours are used, its alpha is not")
        if mask.facts.white in (0.0, 1.0):
            report.notice(f"{mask.blob.name}: a mask of one value")
