"""One thing the user wrote, and where."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Given:
    """A key as it was written. `text` marks a command-line value that still has to be read as its key's type."""

    name: str
    value: object
    where: str
    folder: Path
    section: str | None = None
    text: bool = False
    written: str = ""

    @property
    def from_command_line(self) -> bool:
        """Whether it was written on the command line."""
        return self.where.startswith("--")

    @property
    def spelled(self) -> str:
        """The name the user wrote."""
        return self.written or self.name

    @property
    def place(self) -> str:
        """Where, as the second half of a message: `line 12` of a file, or the option."""
        return self.where if self.from_command_line else "line " + self.where.rpartition(":")[2]

    def renamed(self, name: str, value: object) -> Given:
        """The same place, said with another key."""
        return replace(self, name=name, value=value, text=False, written=self.spelled)


@dataclass
class Problems:
    """Everything that is wrong so far: the user sees all of it at once."""

    messages: list[str] = field(default_factory=list)

    def add(self, where: str, message: str) -> None:
        """Note one problem; `where` is file:line or the command-line option."""
        text = f"{where}: {message}" if where else message
        if text not in self.messages:
            self.messages.append(text)
