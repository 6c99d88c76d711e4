"""The configuration as it was understood: written beside the results, put into metadata, compared between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import toml

from library.config import catalogue
from library.config.catalogue import Declared
from library.config.combinations import each_table
from library.config.rewrites import EXCLUSIVE
from library.config.run import Run
from library.config.table import Table
from library.config.values import show

Write = Callable[[object], object]


@dataclass(frozen=True)
class Setting:
    """One resolved key: `place` is its name in `Run.origins`, `origin` where its value comes from."""

    place: str
    key: Declared
    value: object
    origin: str

    @property
    def is_default(self) -> bool:
        """Whether it has the value it would have had unsaid."""
        return self.value == self.key.field.get_default()


def settings(run: Run) -> Iterator[Setting]:
    """Every key of a run that may stand in a file, secrets left out."""
    for prefix, table, _ in each_table(run):
        for name, _, info in table.entries():
            if not (info.command_line_only or info.secret or name == "dataset_config"):
                place = prefix + name
                key = catalogue.declared()[name]
                yield Setting(place, key, getattr(table, name), run.origins.get(place, "default"))


def changed(run: Run) -> list[Setting]:
    """The keys whose value is not the default, for plans and summaries."""
    return [setting for setting in settings(run) if not setting.is_default]


def resolved_toml(run: Run) -> str:
    """The whole configuration as TOML that can be loaded again, each value with its origin. Secrets are left out."""
    head = (
        f"# The configuration of influx_{run.name}.py as it was understood. Secrets are left out.\n"
        "# The comment behind a value says where it comes from.\n"
    )
    return head + _toml(run, _plain, comments=True)


def metadata_toml(run: Run) -> str:
    """The configuration for a file that travels: paths reduced to names, no secrets, only what was changed."""
    return _toml(run, _without_folders, comments=False)


def _toml(run: Run, write: Write, comments: bool) -> str:
    parts = []
    for name in catalogue.TABLES:
        parts += _section(run, f"[{name}]", getattr(run, name), "", write, comments)
    for index, dataset in enumerate(run.datasets):
        parts += _section(run, "[[datasets]]", dataset, f"datasets.{index}.", write, comments)
        for number, subset in enumerate(dataset.subsets):
            prefix = f"datasets.{index}.subsets.{number}."
            parts += _section(run, "[[datasets.subsets]]", subset, prefix, write, comments)
    return "\n".join(parts) + "\n"


def _section(run: Run, header: str, table: Table, prefix: str, write: Write, comments: bool) -> list[str]:
    lines = []
    for name, field, info in table.entries():
        value = getattr(table, name)
        if info.command_line_only or info.secret or name == "dataset_config" or _implied(table, name):
            continue
        if not comments and value == field.get_default():
            continue
        origin = run.origins.get(prefix + name, "default")
        if value is None:
            lines += [f"# {name} is not set"] if comments else []
        else:
            line = f"{name} = {literal(write(value))}"
            lines.append(f"{line}  # {_one_line(origin)}" if comments else line)
    return ["", header, *lines] if lines or header.startswith("[[") else []


def _implied(table: Table, name: str) -> bool:
    """Whether another key says it already: `resolution` beside `resolutions` would be a contradiction."""
    return any(name == first and bool(getattr(table, second, None)) for first, second in EXCLUSIVE)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def literal(value: object) -> str:
    """A plain scalar or list as TOML. The `toml` package misreads what is not printable; that is escaped here."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list) and any(isinstance(entry, str) for entry in value):
        return "[" + ", ".join(literal(entry) for entry in value) + "]"
    return toml.dumps({"value": value}).partition(" = ")[2].strip()


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _without_folders(value: object) -> object:
    """Paths become file names, wherever they stand."""
    if isinstance(value, tuple):
        return [_without_folders(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_a_path(value)):
        return Path(str(value).replace("\\", "/")).name
    return value


def _is_a_path(text: str) -> bool:
    return Path(text).is_absolute() or text.startswith(("~", "./", "../")) or text[1:3] in (":\\", ":/")


def identity(run: Run) -> dict[str, object]:
    """What makes a run this run: keys the trainer reads that must not change when it is continued.

    Paths count by name, since a folder may be moved; what is in them is covered by the cache's own fingerprints.
    """
    return {
        setting.place: _without_folders(_plain(setting.value))
        for setting in settings(run)
        if _identifies(setting.key) and setting.value is not None
    }


_PLACES = ("output_dir", "logging_dir", "dataset_cache_dir", "cache_dir")


def _identifies(key: Declared) -> bool:
    return "train" in key.readers and not key.info.rerun and key.name not in _PLACES


def split(identity: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """What binds a run that is continued, and what may change with a warning because only the bits depend on it."""
    keys = catalogue.declared()
    inexact = {place for place in identity if place in keys and keys[place].info.inexact}
    return (
        {place: value for place, value in identity.items() if place not in inexact},
        {place: value for place, value in identity.items() if place in inexact},
    )


def identity_hash(run: Run) -> str:
    """The identity as one short word."""
    text = json.dumps(identity(run), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """What changed between two identities, one line per key."""
    lines = []
    for place in sorted(old.keys() | new.keys()):
        before, after = old.get(place), new.get(place)
        if before != after:
            was, now = ("not set" if value is None else show(value) for value in (before, after))
            lines.append(f"{place}: {was} -> {now}")
    return lines
