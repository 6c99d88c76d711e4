"""Items that show the same pictures, whatever their files are called, and however they were saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from library.data.lint.findings import Finding
from library.data.pictures import Pictures

THUMBNAIL = 32  # pixels a side
COARSE = 8  # thumbnail pixels a side in the first comparison, of which all pairs are made
NEAR = 2.5  # of 255, root mean square, coarse: worth a closer look
SAME = 20  # of 255: no thumbnail value differs by more ...
SAME_MEAN = 2.0  # ... and all together by no more than this
MOST_COMPARED = 20_000  # items: comparing all pairs of more takes minutes; equal files are still found
MOST_NAMED = 3
BLOCK = 1024


@dataclass(frozen=True)
class Look:
    """What an item is compared by. kind: only items of one kind are; files: hashes of its files."""

    kind: Hashable
    files: Hashable
    thumbnails: bytes


def thumbnails(pictures: Pictures, *, with_mask: bool) -> bytes:
    """Small versions of an item's pictures, and of its mask where that is one of its files."""
    parts = [pictures.source, *([pictures.target] if pictures.target is not None else [])]
    if with_mask:
        parts += [Image.fromarray(pictures.masks[0].astype(np.uint8) * 255).convert("RGB")]
    small = [part.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0) for part in parts]
    return b"".join(part.tobytes() for part in small)


def check_duplicates(keys: Sequence[str], looks: Sequence[Look]) -> Iterator[Finding]:
    """A finding for each item that has a double."""
    for group in _groups(looks):
        names = [keys[number] for number in group]
        exact = len({looks[number].files for number in group}) == 1
        for name in names:
            others = [other for other in names if other != name]
            more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
            how = "the same files' content as" if exact else "looks the same as"
            message = f"{how} {', '.join(others[:MOST_NAMED])}{more}"
            yield Finding(name, "duplicate", message, {"others": others})


def _groups(looks: Sequence[Look]) -> list[list[int]]:
    """Numbers of items that belong together, in order."""
    leader = list(range(len(looks)))

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    pairs = _same_files(looks) if len(looks) > MOST_COMPARED else _same_thumbnails(looks)
    for first, second in pairs:
        low, high = sorted((find(first), find(second)))
        leader[high] = low
    groups = defaultdict(list)
    for number in range(len(looks)):
        groups[find(number)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _same_files(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    seen: dict[Hashable, int] = {}
    for number, look in enumerate(looks):
        first = seen.setdefault((look.kind, look.files), number)
        if first != number:
            yield first, number


def _same_thumbnails(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    kinds = defaultdict(list)
    for number, look in enumerate(looks):
        kinds[look.kind, len(look.thumbnails)].append(number)
    for numbers in kinds.values():
        fine = np.stack([np.frombuffer(looks[number].thumbnails, np.uint8) for number in numbers])
        for first, second in _near(fine):
            yield numbers[first], numbers[second]


def _near(fine: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose thumbnails are the same: first by all pairs of coarse ones, then pixel by pixel."""
    step = THUMBNAIL // COARSE
    coarse = fine.reshape(len(fine), -1, COARSE, step, COARSE, step, 3).mean(axis=(3, 5), dtype=np.float32)
    coarse = coarse.reshape(len(fine), -1)
    squares = (coarse**2).sum(axis=1)
    limit = NEAR**2 * coarse.shape[1]
    for start in range(0, len(fine), BLOCK):
        rows = coarse[start : start + BLOCK]
        apart = squares[start : start + BLOCK, None] + squares[None] - 2 * rows @ coarse.T
        for row in range(len(rows)):
            first = start + row
            others = first + 1 + np.nonzero(apart[row, first + 1 :] <= limit)[0]
            differ = np.abs(fine[others].astype(np.int16) - fine[first])
            same = (differ.max(axis=1, initial=0) <= SAME) & (differ.mean(axis=1) <= SAME_MEAN)
            yield from ((first, int(second)) for second in others[same])
