"""Items from tables that list them: JSON Lines and CSV.

A column is there for every item or for none: a row with an empty cell beside rows that fill it would mean something
else (an image that is its own target, a mask that is all white), and nobody asked for that.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from library.conditioning import MODES
from library.config.tables import SubsetTable
from library.data.records import FileBlob, Record
from library.data.report import Report
from library.data.sources import caption_file, list_images, single

CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
ALIKE = 0.8  # of difflib: "targt" and "masks" are slips, "image_id" is not

Row = tuple[int, dict[str, object]]


def table_records(subset: SubsetTable, path: Path, report: Report) -> Iterator[Record]:
    """The records of a metadata_file. What its columns do not say is looked for in the subset's folders."""
    rows = list(_rows(path, report))
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    names = {
        "image": subset.image_column,
        "target": subset.target_column or "target",
        "mask": subset.mask_column or "mask",
    }
    if rows and names["image"] not in columns:
        report.bad(path.name, f"no column {names['image']}; there are: {', '.join(columns)}")
        return
    _check_columns(subset, path, columns, names, report)
    table = _Table(subset, path, rows, columns, names, report)
    for line, row in rows:
        record = table.record(f"{path.name} line {line}", row)
        if record is not None:
            yield record
    idle = [] if table.num_captions < len(rows) else ["caption_dir", "caption_extension", "caption_per_line"]
    idle += [] if table.looks_into_folders or (subset.caption_dir and not idle) else ["recursive"]
    for name in idle:
        if subset.changed(name):
            report.notice(f"{name} does nothing here: {path.name} says it in every row")


def _check_columns(
    subset: SubsetTable, path: Path, columns: tuple[str, ...], names: dict[str, str], report: Report
) -> None:
    """Report columns that are probably misspelt, and those that contradict the configuration; mention the unused."""
    takes = MODES[subset.mode].takes
    captions = [subset.caption_column] if subset.caption_column is not None else list(CAPTION_COLUMNS)
    used = {*(names[role] for role in ("image", *takes)), *captions}
    lacking = [names[role] for role in sorted(takes) if names[role] not in columns]
    lacking += captions if not set(captions) & set(columns) else []
    unused = [name for name in columns if name not in used]
    for name in unused:
        meant = difflib.get_close_matches(name.lower(), lacking, n=1, cutoff=ALIKE)
        if meant:
            report.bad(path.name, f"has a column {name}, which nothing reads. Did you mean {meant[0]}?")
    if unused:
        report.notice(f"{path.name}: columns that nothing reads: {', '.join(unused)}")
    own = "alpha_mask" if subset.alpha_mask else "generate_mask" if subset.generate_mask else None
    if "mask" in takes and own is not None and names["mask"] in columns:
        report.bad(path.name, f"its column {names['mask']} and {own} each say where masks come from: keep one")


class _Table:
    """Makes the records of one table."""

    def __init__(
        self,
        subset: SubsetTable,
        path: Path,
        rows: list[Row],
        columns: tuple[str, ...],
        names: dict[str, str],
        report: Report,
    ):
        self.subset, self.columns, self.names, self.report = subset, columns, names, report
        self.homes = {"image": subset.image_dir, "target": subset.target_dir, "mask": subset.mask_dir}
        self.root = subset.image_dir or path.parent
        self.mode = MODES[subset.mode]
        self.num_captions = 0
        self._seen: Counter[str] = Counter()
        self._stems = Counter(Path(str(row.get(names["image"]))).stem for _, row in rows)
        self._beside = {
            role: list_images(home, subset.recursive, report)
            for role, home in self.homes.items()
            if role in self.mode.takes and home is not None and names[role] not in columns
        }

    @property
    def looks_into_folders(self) -> bool:
        """Whether some files are found by their names."""
        return bool(self._beside)

    def record(self, name: str, row: dict[str, object]) -> Record | None:
        """The record of a row, or None after a report."""
        cells = {role: row.get(column) for role, column in self.names.items()}
        if not self._are_usable(name, cells):
            return None
        key = Path(str(cells["image"])).with_suffix("").as_posix()
        files = {role: self._file(role, cells[role], key) for role in cells}
        missing = [blob.name for blob in files.values() if blob is not None and not blob.path.is_file()]
        for lost in missing:
            self.report.bad(name, f"{lost} does not exist")
        captions = captions_of(row, self.subset.caption_column, name, self.report)
        if missing or captions == ():
            return None
        self.num_captions += captions is not None
        self._seen[key] += 1
        unique = key if self._seen[key] == 1 else f"{key}#{self._seen[key]}"
        image, target = files["image"], files["target"]
        assert image is not None
        found = None
        if captions is None:
            found = caption_file(self.subset, self._stem(key), image.path, target.path if target else None)
        return Record(unique, image, target, files["mask"], captions, found)

    def _are_usable(self, name: str, cells: dict[str, object]) -> bool:
        if not cells["image"]:
            self.report.bad(name, f"no value in the column {self.names['image']}")
            return False
        for role, cell in cells.items():
            column = self.names[role]
            if cell is not None and not isinstance(cell, str):
                self.report.bad(name, f"{column} is {cell!r}, not a path")
                return False
            if not cell and column in self.columns and role in self.mode.takes - self.mode.needs:
                self.report.bad(
                    name,
                    f"no value in the column {column}, which other rows have: fill it, or list such items in a table "
                    "of their own",
                )
                return False
        return True

    def _file(self, role: str, cell: object, key: str) -> FileBlob | None:
        home = self.homes[role] or self.root
        if cell:
            return FileBlob(home / str(cell), home)
        beside = self._beside.get(role, {})
        stem = key if key in beside else self._stem(key)
        path = single(stem, beside[stem], self.report) if stem in beside else None
        return None if path is None else FileBlob(path, home)

    def _stem(self, key: str) -> str:
        """What an item's files in other folders are named: without its image's folder, if no other item is."""
        stem = Path(key).name
        return stem if self._stems[stem] == 1 else key


def captions_of(row: dict[str, object], column: str | None, name: str, report: Report) -> tuple[str, ...] | None:
    """The captions of a row: None without a caption column, () after a report."""
    if column is not None and column not in row:
        report.bad(name, f"no column {column}; there are: {', '.join(map(str, row))}")
        return ()
    wanted = [column] if column is not None else [name for name in CAPTION_COLUMNS if name in row]
    if not wanted or row[wanted[0]] is None:
        return None
    value = row[wanted[0]]
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts) or not texts:
        report.bad(name, f"the caption is {value!r}, neither a text nor a list of texts")
        return ()
    return tuple(texts)


def _rows(path: Path, report: Report) -> Iterator[tuple[int, dict[str, object]]]:
    """Numbered rows of a table file; what cannot be read is reported."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        report.bad(str(path), f"cannot be read ({error.strerror or error})")
        return
    except UnicodeDecodeError as error:
        report.bad(str(path), f"is not UTF-8 (byte {error.start}): save it as UTF-8")
        return
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text, report)
    else:
        yield from _json_rows(path, text, report)


def _csv_rows(path: Path, text: str, report: Report) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                report.bad(f"{path.name} line {reader.line_num}", "has another number of columns than the first line")
            else:
                yield reader.line_num, {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        report.bad(f"{path.name} line {reader.line_num}", f"is not CSV ({error})")
    if not reader.fieldnames or reader.line_num < 2:
        report.bad(str(path), "lists no items")


def _json_rows(path: Path, text: str, report: Report) -> Iterator[tuple[int, dict[str, object]]]:
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        count += 1
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            report.bad(f"{path.name} line {number}", f"is not JSON ({error.msg} at column {error.colno})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            report.bad(f"{path.name} line {number}", "is not a JSON object")
    if not count:
        report.bad(str(path), "lists no items")
