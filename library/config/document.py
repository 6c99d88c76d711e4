"""One TOML file as a list of given keys, each with its line."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from library.config.catalogue import SECTIONS
from library.config.given import Given, Problems
from library.config.toml_lines import KeyPath, Lines, scan
from library.config.values import closest, show

_POSITION = re.compile(r"^(?P<what>.*?) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.S)


@dataclass
class GivenDataset:
    """One [[datasets]] table as it was written."""

    keys: list[Given] = field(default_factory=list)
    subsets: list[list[Given]] = field(default_factory=list)
    where: str = ""
    subsets_where: list[str] = field(default_factory=list)


@dataclass
class Document:
    """A TOML file: keys outside [[datasets]], and the data sets (None if it has no such table).

    unreadable: nothing is known of what it says, so nothing can be said to be missing from it.
    """

    keys: list[Given] = field(default_factory=list)
    datasets: list[GivenDataset] | None = None
    datasets_at: str = ""
    unreadable: bool = False


class _Reader:
    def __init__(self, path: Path, problems: Problems):
        self.path = path
        self.shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
        self.problems = problems
        self.lines = Lines()

    def where(self, path: KeyPath) -> str:
        line = self.lines.of(path)
        return f"{self.shown}:{line}" if line else self.shown

    def given(self, path: KeyPath, value: object, section: str | None) -> Given:
        return Given(str(path[-1]), value, self.where(path), self.path.parent, section)

    def read(self) -> Document:
        text = self.text()
        if text is None:
            return Document(unreadable=True)
        self.lines = scan(text)
        for path, lines in self.lines.twice():
            name = ".".join(str(part) for part in path)
            self.problems.add(f"{self.shown}:{lines[1]}", f"{name} stands twice, on lines {_and(lines)}. Keep one.")
        if self.lines.twice():
            return Document(unreadable=True)
        try:
            content = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            self.problems.add(*self.syntax(error, text))
            return Document(unreadable=True)
        return self.document(content)

    def text(self) -> str | None:
        try:
            return self.path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self.problems.add(f"{self.shown}:{line}", "this is not UTF-8 text. Save the file as UTF-8.")
        except OSError as error:
            self.problems.add(self.shown, f"cannot be read: {error.strerror or error}.")
        return None

    def syntax(self, error: Exception, text: str) -> tuple[str, str]:
        match = _POSITION.match(str(error))
        what = match["what"] if match else str(error)
        if not match or not match["line"]:
            return self.shown, f"this is no TOML: {what}."
        number = int(match["line"])
        rows = text.split("\n")
        row = rows[number - 1].strip() if number <= len(rows) else ""
        return f"{self.shown}:{number}", f"this is no TOML: {what}, in `{row}`.{_syntax_hint(what, row)}"

    def document(self, content: dict[str, object]) -> Document:
        document = Document()
        for name, value in content.items():
            if name == "datasets":
                document.datasets = self.datasets(value)
                document.datasets_at = self.where((name, 0))
            elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
                self.doubled(name)
                document.unreadable = True  # what else seems to be missing may stand there
            elif isinstance(value, dict) and (name in SECTIONS or not name.endswith("_args")):
                document.keys.extend(self.section(name, value))
            else:
                document.keys.append(self.given((name,), value, None))
        return document

    def doubled(self, name: str) -> None:
        """[[name]] where only [name] or [[datasets]] can stand."""
        if name in SECTIONS:
            message = f"[[{name}]] stands once, in single brackets: [{name}]. Double brackets are for [[datasets]]."
        else:
            near = closest(name, ["datasets", *SECTIONS])
            tables = ", ".join(f"[{section}]" for section in SECTIONS)
            message = f"there is no table [[{name}]].{near} The tables are {tables} and [[datasets]]."
        if name == "dataset":
            message = "[[dataset]] is written [[datasets]]; what all data sets share stands in [dataset]."
        self.problems.add(self.where((name, 0)), message)

    def section(self, name: str, value: dict[str, object]) -> list[Given]:
        if name not in SECTIONS:
            tables = ", ".join(f"[{section}]" for section in SECTIONS)
            near = closest(name, list(SECTIONS))
            self.problems.add(
                self.where((name,)), f"there is no table [{name}].{near} The tables are {tables} and [[datasets]]."
            )
            return []
        return [self.given((name, key), entry, name) for key, entry in value.items()]

    def datasets(self, value: object) -> list[GivenDataset]:
        return [
            self.dataset(index, entry)
            for index, entry in enumerate(self.tables(("datasets",), value, "[[datasets]]"))
        ]  # fmt: skip

    def dataset(self, index: int, table: dict[str, object]) -> GivenDataset:
        path: KeyPath = ("datasets", index)
        found = GivenDataset(where=self.where(path))
        for name, value in table.items():
            if name == "subsets":
                for number, subset in enumerate(self.tables((*path, name), value, "[[datasets.subsets]]")):
                    place = (*path, name, number)
                    found.subsets_where.append(self.where(place))
                    found.subsets.append([self.given((*place, key), entry, "subset") for key, entry in subset.items()])
            else:
                found.keys.append(self.given((*path, name), value, "dataset"))
        return found

    def tables(self, path: KeyPath, value: object, header: str) -> list[dict[str, object]]:
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            return value
        found = f"[{path[-1]}]" if isinstance(value, dict) else show(value)
        self.problems.add(self.where(path), f"found {found}; it is written with double brackets: {header}")
        return []


def _and(lines: list[int]) -> str:
    return ", ".join(str(line) for line in lines[:-1]) + f" and {lines[-1]}"


def _syntax_hint(what: str, row: str) -> str:
    if "\\" in row and ("Unescaped" in what or "hex" in what.lower() or "escape" in what.lower()):
        fixed = re.sub(r'"([^"]*)"', lambda quoted: "'" + quoted[1] + "'", row)
        return f" A backslash needs single quotes: `{fixed}`; or write the path with forward slashes."
    value = row.partition("=")[2].strip()
    if value in ("True", "False"):
        return f" Write {value.lower()}."
    if value in ("None", "null", "nil", "none"):
        return " To leave a key unset, remove its line."
    if re.match(r"[A-Za-z/~.]", value):
        return " Text needs quotes."
    return ""


def read(path: Path, problems: Problems) -> Document:
    """Read a TOML file. Whatever is wrong with it goes to `problems`."""
    return _Reader(path, problems).read()
