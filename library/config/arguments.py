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


def repeated(given: Sequence[Given], command: Command, other: Command) -> tuple[str, ...]:
    """The words of one command's line that another command has to be given too, to mean the same experiment.

    Left out: actions of the one call, keys the other does not read, and secrets, which belong into no message.
    """
    words: list[str] = []
    for one in given:
        key = catalogue.canonical(one.name, None, command, command_line=True)
        names = REWRITES[one.name].keys if one.name in REWRITES else (key,)
        known = [catalogue.declared()[name] for name in names if name is not None]
        heard = any(other in key.readers for key in known) and not any(key.info.secret for key in known)
        if heard and not any(key.info.command_line_only and key.name != "config_file" for key in known):
            values = [str(value) for value in one.value] if isinstance(one.value, list) else [str(one.value)]
            words += [f"{one.where}={values[0]}"] if values[0].startswith("--") else [one.where, *values]
    return tuple(words)


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
