"""What is wrong with a data set, all of it at once, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.errors import DataError

MOST_LISTED = 200


@dataclass(frozen=True)
class Problem:
    """An item (or subset) that cannot be used. skippable: skip_bad goes on without it."""

    name: str
    reason: str
    skippable: bool = True


@dataclass
class Report:
    """Collected while planning: what is bad, and what the user may want to know."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def bad(self, name: str, reason: str, *, skippable: bool = True) -> None:
        """One item that cannot be used."""
        self.problems.append(Problem(printable(name).replace("\n", "\\n"), printable(reason), skippable))

    def notice(self, text: str) -> None:
        """Something that was done and may surprise; said once."""
        if text not in self.notices:
            self.notices.append(printable(text))

    def stop_if_bad(self, skip_bad: bool) -> None:
        """Raise DataError listing everything bad, but for the items that the user chose to go on without."""
        stopping = [problem for problem in self.problems if not (skip_bad and problem.skippable)]
        if stopping:
            raise DataError(f"{listed(stopping)}\nNothing was encoded. {_advice(stopping, skip_bad)}")
        if self.problems:
            self.notice(f"skip_bad: going on without {listed(self.problems)}")


def _advice(problems: list[Problem], skip_bad: bool) -> str:
    skippable = sum(problem.skippable for problem in problems)
    if skip_bad or not skippable:
        return "Mend or remove them."
    if skippable < len(problems):
        return "Mend or remove them. (skip_bad = true goes on without bad items of the data, not without previews.)"
    return "Mend or remove them, or set skip_bad = true to go on without them."


def listed(problems: list[Problem]) -> str:
    """The problems as a heading with a count and one line each."""
    lines = [f"  {problem.name}: {problem.reason}" for problem in problems[:MOST_LISTED]]
    if len(problems) > MOST_LISTED:
        lines.append(f"  ... and {len(problems) - MOST_LISTED} more")
    things = "1 thing that cannot be used" if len(problems) == 1 else f"{len(problems)} things that cannot be used"
    return "\n".join([f"{things}:", *lines])


def printable(text: str) -> str:
    """Text that any terminal takes: no control characters (file names may hold them), no lone surrogates."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in safe)
