"""The command line as a list of given keys.

`--key value`, `--key=value`, several values for a list, and for a boolean `--key`, `--key true` or `--key false`.
Everything wrong is reported at once, which argparse cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.config import catalogue
from library.config.given import Given, Problems
from library.config.rewrites import REWRITES
from library.config.table import Command
from library.config.values import is_bool, takes_list


def parse(argv: Sequence[str], command: Command, problems: Problems) -> list[Given]:
    """Read the command line. Values stay text (a list of str) until the key's type is known."""
    found: list[Given] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            problems.add(token, _stray(token))
            continue
        option, equals, text = token.partition("=")
        name = option[2:].replace("-", "_")
        following = _take(tokens, name, command) if not equals else [text]
        if following is None:
            problems.add(option, "needs a value.")
            continue
        found.append(Given(name, following, option, Path.cwd(), None, text=True))
    return found


def _stray(token: str) -> str:
    if token.endswith(".toml"):
        return f"a configuration is given as --config_file {token}"
    return "this belongs to no option. Options begin with two dashes; text with spaces needs quotes."


def _take(tokens: list[str], name: str, command: Command) -> list[str] | None:
    """The values that follow an option: none for a boolean, all for a list, one for anything else."""
    until = next((index for index, token in enumerate(tokens) if token.startswith("--")), len(tokens))
    key = catalogue.canonical(name, None, command, command_line=True)
    if name in REWRITES:
        boolean, several = REWRITES[name].kind == "bool", False
    elif key is None:
        boolean, several = until == 0, True  # unknown: reported later, with its values
    else:
        field = catalogue.declared()[key].field
        boolean, several = is_bool(field.annotation), takes_list(field.annotation)
    if boolean:
        count = min(until, 1)
    else:
        count = until if several else min(until, 1)
        if count == 0:
            return None
    values = tokens[:count]
    del tokens[:count]
    return values or ["true"]
