"""The help of a command: its keys, grouped by table."""

from __future__ import annotations

import shutil
import textwrap

from library.config import catalogue
from library.config.catalogue import ALL_TABLES, Declared
from library.config.rewrites import REWRITES
from library.config.table import Command, Table
from library.config.values import short_type, show

USAGE: dict[Command, str] = {
    "cache": "influx_cache.py --config_file FILE.toml [--key value ...]\n\n"
    "Encode images, masks and captions once, so that training needs neither VAE nor text encoders.",
    "train": "influx_train.py --config_file FILE.toml [--key value ...]\n\n"
    "Train a network on what influx_cache.py encoded.",
    "infer": "influx_infer.py --lora FILE --image FILE --prompt TEXT [--key value ...]\n\n"
    "Edit an image, or a folder of images, with a trained network.",
}

_HOW = (
    "Every key may stand in the TOML file (in its table or at the top) or on the command line, which wins. Lists are "
    "TOML arrays, several values, or one string split on semicolons. Keys of the other commands are accepted and left "
    "alone. `--help WORD` shows one table, or the keys with that word in their names. docs/configuration.md says more."
)


def default_text(value: object) -> str:
    """A default as help and reference write it."""
    if value is None or value == ():
        return "not set"
    return show(value)


def help_text(command: Command, about: str | None = None) -> str:
    """What --help prints: every key this command reads, or those of one table or with `about` in their names."""
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    parts = ["usage: " + USAGE[command], fill(_HOW, width)] if about is None else []
    for name, table in ALL_TABLES.items():
        keys = [key for key in catalogue.declared().values() if key.table == name and command in key.readers]
        keys = [key for key in keys if about in (None, name) or any(about in each for each in _names(key))]
        if keys:
            parts.append(f"{title(name, table)}\n" + "\n".join(_entry(key, command, width) for key in keys))
    rewrites = [name for name, how in REWRITES.items() if command in _readers(how.keys[0])]
    rewrites = [name for name in rewrites if about is None or about in name]
    if rewrites:
        parts.append("Also accepted\n" + "\n".join(_rewrite(name, width) for name in rewrites))
    if not parts:
        parts.append(f"influx_{command}.py reads no key like that: {catalogue.unknown(about or '')}")
    return "\n\n".join(parts) + "\n"


def _names(key: Declared) -> tuple[str, ...]:
    return (key.name, *key.info.aliases)


def title(name: str, table: type[Table]) -> str:
    """How a table is written in TOML, and what it is for."""
    heading = {"command": "(command line)", "dataset": "[dataset] or [[datasets]]", "subset": "[[datasets.subsets]]"}
    return f"{heading.get(name, f'[{name}]')}  {(table.__doc__ or '').strip()}"


def fill(text: str, width: int, indent: str = "") -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)


def _readers(name: str) -> frozenset[str]:
    return catalogue.declared()[name].readers


def _entry(key: Declared, command: Command, width: int) -> str:
    names = [key.name, *key.info.aliases]
    if key.info.short and command == "infer":
        names.insert(1, key.info.short)
    head = f"  --{', --'.join(names)}  ({short_type(key.field.annotation)}; "
    head += f"{default_text(key.field.get_default())}{'; ' + key.info.range if key.info.range else ''})"
    return fill(head, width, "  ") + "\n" + fill(key.field.description or "", width, "        ")


def _rewrite(name: str, width: int) -> str:
    how = REWRITES[name]
    return f"  --{name}  ({how.kind}; {how.default})\n" + fill(how.documentation, width, "        ")
