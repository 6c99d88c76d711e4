"""On which line each key of a TOML file stands.

tomllib keeps no positions, and an error without a line is half an error. This scan knows just enough TOML to walk over
headers, dotted and quoted keys, strings of all four kinds, arrays and inline tables. It never judges: what it
cannot follow it leaves to tomllib, which then raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^\s,\]}#]+(?:[ ]\d\d:\d\d[^\s,\]}#]*)?")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")


class _Lost(Exception):
    """The text is no TOML that this scan can follow."""


@dataclass
class Lines:
    """Key path -> every line it is defined on (more than one: defined twice)."""

    lines: dict[KeyPath, list[int]] = field(default_factory=dict)

    def of(self, path: KeyPath) -> int | None:
        """The line of a key, or of the nearest table around it."""
        while path:
            if path in self.lines:
                return self.lines[path][0]
            path = path[:-1]
        return None

    def twice(self) -> list[tuple[KeyPath, list[int]]]:
        """Keys defined more than once."""
        return [(path, lines) for path, lines in self.lines.items() if len(lines) > 1]


class _Scan:
    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.found = Lines()
        self.counts: dict[KeyPath, int] = {}
        self.tables: set[KeyPath] = set()

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _Lost
        self.at = match.end()
        return match.group()

    def sees(self, mark: str) -> bool:
        return self.text.startswith(mark, self.at)

    def expect(self, mark: str) -> None:
        if not self.sees(mark):
            raise _Lost
        self.at += len(mark)

    def note(self, path: KeyPath, line: int) -> None:
        self.found.lines.setdefault(path, []).append(line)

    def document(self) -> None:
        table: KeyPath = ()
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return
            if self.sees("["):
                table = self.header()
            else:
                self.pair(table)

    def header(self) -> KeyPath:
        line = self.line()
        array = self.sees("[[")
        self.expect("[[" if array else "[")
        names = self.dotted()
        self.expect("]]" if array else "]")
        path = self.inside(names[:-1]) + (names[-1],)
        if array:
            index = self.counts.get(path, 0)
            self.counts[path] = index + 1
            path += (index,)
            self.note(path, line)
        else:
            path = self.inside(names)
            if path in self.tables or path not in self.found.lines:
                self.note(path, line)
            self.tables.add(path)
        return path

    def inside(self, names: list[str]) -> KeyPath:
        """A header's names mean the newest element of every array of tables on the way."""
        path: KeyPath = ()
        for name in names:
            path += (name,)
            if path in self.counts:
                path += (self.counts[path] - 1,)
        return path

    def dotted(self) -> list[str]:
        names = []
        while True:
            self.skip(_SPACE)
            names.append(self.name())
            self.skip(_SPACE)
            if not self.sees("."):
                return names
            self.expect(".")

    def name(self) -> str:
        if self.sees('"') or self.sees("'"):
            start = self.at
            mark = self.text[start]
            self.string()
            inner = self.text[start + 1 : self.at - 1]
            return inner.encode().decode("unicode_escape", "replace") if mark == '"' and "\\" in inner else inner
        return self.skip(_BARE)

    def pair(self, table: KeyPath) -> None:
        line = self.line()
        path = table + tuple(self.dotted())
        self.expect("=")
        self.note(path, line)
        self.skip(_SPACE)
        self.value(path)

    def value(self, path: KeyPath) -> None:
        if self.sees('"') or self.sees("'"):
            self.string()
        elif self.sees("["):
            self.array(path)
        elif self.sees("{"):
            self.inline(path)
        else:
            self.skip(_SCALAR)

    def string(self) -> None:
        mark = self.text[self.at]
        triple = self.sees(mark * 3)
        end = mark * 3 if triple else mark
        self.at += len(end)
        while not self.sees(end):
            if self.at >= len(self.text) or (not triple and self.sees("\n")):
                raise _Lost
            self.at += 2 if mark == '"' and self.sees("\\") else 1
        self.at += len(end)
        while triple and self.sees(mark):
            self.at += 1

    def array(self, path: KeyPath) -> None:
        self.expect("[")
        index = 0
        while True:
            self.skip(_BLANK)
            if self.sees("]"):
                return self.expect("]")
            self.value(path + (index,))
            index += 1
            self.skip(_BLANK)
            if not self.sees("]"):
                self.expect(",")

    def inline(self, path: KeyPath) -> None:
        self.expect("{")
        while True:
            self.skip(_BLANK)
            if self.sees("}"):
                return self.expect("}")
            self.pair(path)
            self.skip(_BLANK)
            if not self.sees("}"):
                self.expect(",")


def scan(text: str) -> Lines:
    """The lines of all keys, as far as the text can be followed."""
    walk = _Scan(text)
    try:
        walk.document()
    except (_Lost, RecursionError):
        return walk.found
    return walk.found
