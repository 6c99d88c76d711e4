"""Items from Hugging Face data sets: a hub id, a local folder or a parquet file, on the disk or streamed.

The `datasets` package is an optional extra, imported here and nowhere else. Images are taken as bytes and opened by
library.data.images like any other file.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from library.config.tables import SubsetTable
from library.data.records import Blob, Record
from library.data.report import Report
from library.data.tables import captions_of
from library.errors import ConfigError, DataError
from library.files import FileStat

WINDOW = 64  # rows of a stream that stay in memory: threads ask a little out of order


@dataclass(frozen=True)
class Cell:
    """An image in a table."""

    table: Table
    row: int
    column: str

    @property
    def name(self) -> str:
        return f"{self.table.name} row {self.row} {self.column}"

    @property
    def key(self) -> str:
        return f"{self.table.identity}:{self.row}:{self.column}"

    @property
    def streams(self) -> bool:
        """Whether it should be read in the order of the rows."""
        return self.table.streams

    def stat(self) -> FileStat | None:
        return None

    def read(self) -> bytes:
        return self.table.image(self.row, self.column)


class Table:
    """Rows of a data set. A stream is read forward, and from its beginning again when an earlier row is wanted."""

    def __init__(self, name: str, rows: Any, columns: list[str], identity: str, streams: bool):
        self.name = name
        self.identity = identity
        self.streams = streams
        self._rows = rows
        self._columns = columns
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, dict] = OrderedDict()
        self._ahead: Iterator[tuple[int, dict]] | None = None
        self._next = 0

    def image(self, row: int, column: str) -> bytes:
        """The bytes of an image file."""
        if not self.streams:
            return _bytes_of(self._rows.select_columns([column])[row][column])
        with self._lock:
            return _bytes_of(self._streamed(row)[column])

    def _streamed(self, row: int) -> dict:
        if row not in self._recent:
            if self._ahead is None or row < self._next:
                self._ahead = enumerate(iter(self._rows.select_columns(self._columns)))
                self._recent.clear()
            for number, content in self._ahead:
                self._recent[number] = content
                self._next = number + 1
                if len(self._recent) > WINDOW:
                    self._recent.popitem(last=False)
                if number == row:
                    break
        if row not in self._recent:
            raise OSError(f"the stream has no row {row} any more")
        return self._recent[row]

    def texts(self, columns: list[str]) -> Iterator[dict]:
        """All rows without their images."""
        yield from self._rows.select_columns(columns) if columns else ({} for _ in self._rows)


def _bytes_of(cell: object) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(path, str):
        return Path(path).read_bytes()
    return b""


def hub_records(subset: SubsetTable, report: Report) -> list[Record]:
    """All records of a subset's dataset_name. Columns that are not there are reported."""
    columns = {"image": subset.image_column, "target": subset.target_column, "mask": subset.mask_column}
    wanted = [column for column in columns.values() if column is not None]
    rows = _load(subset)
    present = list(rows.features or rows.column_names or [])
    lacking = [column for column in [*wanted, subset.caption_column] if column is not None and column not in present]
    if lacking:
        report.bad(str(subset.dataset_name), f"no column {', '.join(lacking)}; there are: {', '.join(present)}")
        return []
    table = Table(_short(subset), _undecoded(rows, wanted), wanted, _identity(subset, rows), _streams(subset))
    others = [column for column in present if column not in wanted]
    return list(_records(table, columns, others, subset, report))


def _records(
    table: Table, columns: dict[str, str | None], others: list[str], subset: SubsetTable, report: Report
) -> Iterator[Record]:
    number = -1
    for number, row in enumerate(table.texts(others)):
        captions = captions_of(row, subset.caption_column, f"{table.name} row {number}", report)
        cells: dict[str, Blob | None] = {
            role: None if column is None else Cell(table, number, column) for role, column in columns.items()
        }
        image = cells["image"]
        assert image is not None
        if captions != ():
            yield Record(f"{number:06}", image, cells["target"], cells["mask"], captions)
    if number < 0:
        report.bad(table.name, "lists no items")


def _was_saved(name: str) -> bool:
    """Whether this is a folder of `save_to_disk`, of one split or of several. Its rows are mapped from the disk as they
    are: there is nothing to stream."""
    return any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _streams(subset: SubsetTable) -> bool:
    return subset.dataset_streaming and not _was_saved(str(subset.dataset_name))


def _short(subset: SubsetTable) -> str:
    return str(subset.dataset_name).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _load(subset: SubsetTable) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset_name = {subset.dataset_name} needs the `datasets` package: pip install datasets"
        ) from error
    name = str(subset.dataset_name)
    options: dict[str, Any] = {"split": subset.dataset_split, "streaming": subset.dataset_streaming}
    try:
        if name.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files={subset.dataset_split: name}, **options)
        if _was_saved(name):
            saved = datasets.load_from_disk(name)
            return saved[subset.dataset_split] if isinstance(saved, datasets.DatasetDict) else saved
        revision = None if Path(name).exists() else subset.dataset_revision
        return datasets.load_dataset(name, subset.dataset_config_name, revision=revision, **options)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset_name = {name}: {str(error).strip() or type(error).__name__} "
            f"(dataset_config_name = {subset.dataset_config_name}, dataset_split = {subset.dataset_split})"
        ) from error


def _undecoded(rows: Any, columns: list[str]) -> Any:
    """The same rows with image columns as the files' bytes."""
    import datasets

    for column in columns:
        if rows.features is None or isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _identity(subset: SubsetTable, rows: Any) -> str:
    """What the rows are known by: the library's fingerprint of the data, or a stream's name, revision and files."""
    if not _streams(subset):
        return f"hf:{rows._fingerprint}"
    path = Path(str(subset.dataset_name))
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    told = [
        str(subset.dataset_name), subset.dataset_config_name, subset.dataset_split, subset.dataset_revision, stats
    ]  # fmt: skip
    return f"hf-stream:{sha256(json.dumps(told).encode()).hexdigest()[:32]}"
