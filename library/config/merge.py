"""From what was written to one value per key: names, types, paths, rewrites, precedence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from library.config import catalogue
from library.config.given import Given, Problems
from library.config.rewrites import EXCLUSIVE, REWRITES, SPELLINGS, Rewrite
from library.config.table import Command
from library.config.values import CONTROL, from_text, show, split

UNSET = object()
"""The value of a key given as an empty string."""

Scope = dict[str, Given]


def recognise(given: Iterable[Given], command: Command, problems: Problems) -> list[Given]:
    """Canonical names and typed values; keys that do not exist or stand in the wrong place become problems."""
    found = []
    for one in given:
        named = _named(one, command, problems)
        if named is not None:
            found.append(SPELLINGS.get(named.name, lambda same: same)(_typed(named, problems)))
    return found


def _named(one: Given, command: Command, problems: Problems) -> Given | None:
    if one.name in REWRITES:
        table = catalogue.declared()[REWRITES[one.name].keys[0]].sections
        return one if _well_placed(one, table, problems) else None
    name = catalogue.canonical(one.name, one.section, command, one.from_command_line)
    if name is None:
        problems.add(one.where, catalogue.unknown(one.name))
        return None
    key = catalogue.declared()[name]
    if key.info.command_line_only and not one.from_command_line:
        problems.add(one.where, f"{one.name} is an action, not a setting: give it on the command line, as --{name}.")
        return None
    if key.info.not_yet:
        problems.add(one.where, f"{one.name} does not work yet: {key.info.not_yet}")
        return None
    if isinstance(one.value, dict) and not name.endswith("_args"):
        problems.add(one.where, f"{one.name} is a key, not a table.")
        return None
    if one.section == "subset" and key.table != "subset":
        problems.add(one.where, f"{one.name} cannot differ between subsets; it belongs in {_places(key.sections)}.")
        return None
    return replace(one, name=name, written=one.name) if _well_placed(one, key.sections, problems) else None


def _well_placed(one: Given, sections: tuple[str, ...], problems: Problems) -> bool:
    if one.section is None or one.section in sections or (one.section == "subset" and "dataset" in sections):
        return True
    problems.add(one.where, f"{one.name} does not belong in [{one.section}]; it belongs in {_places(sections)}.")
    return False


def _places(sections: tuple[str, ...]) -> str:
    where = [f"[{section}]" for section in sections if section != "command"]
    if "dataset" in sections and "general" in sections:
        where.append("[[datasets]]")
    return " or ".join(where + ["the top of the file"])


def _typed(one: Given, problems: Problems) -> Given:
    if one.name in REWRITES:
        return _typed_rewrite(one, REWRITES[one.name], problems)
    key = catalogue.declared()[one.name]
    value = one.value
    if one.text:
        parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        value = UNSET if parts == [""] else from_text(parts, key.field, key.info)
    if value == "":
        value = UNSET
    if isinstance(value, str) and key.info.comma and key.name not in SPELLINGS:
        value = split(value, key.info)
    if key.info.path in ("path", "model"):
        value = _paths(value, one, key.info.path == "model", problems)
    return replace(one, value=value, text=False)


def _typed_rewrite(one: Given, rewrite: Rewrite, problems: Problems) -> Given:
    value = one.value
    if one.text:
        text = str(value[0]) if isinstance(value, list) else str(value)
        value = {"true": True, "false": False}.get(text.lower(), text)
        if rewrite.kind == "int" and re.fullmatch(r"\d+", text):
            value = int(text)
    kind = bool if rewrite.kind == "bool" else int
    if value == "":
        return replace(one, value=UNSET, text=False)
    if type(value) is not kind or (kind is int and value < 1):
        wanted = "true or false" if kind is bool else "a whole number, at least 1"
        problems.add(one.where, f"{one.name} = {show(value)}: needs {wanted}.")
        value = UNSET
    return replace(one, value=value, text=False)


def _paths(value: object, one: Given, model: bool, problems: Problems) -> object:
    if isinstance(value, list):
        return [_paths(part, one, model, problems) for part in value]
    if not isinstance(value, str):
        return value
    if CONTROL.search(value):
        plain = value.translate({7: r"\a", 8: r"\b", 9: r"\t", 10: r"\n", 11: r"\v", 12: r"\f", 13: r"\r"})
        plain = CONTROL.sub("", plain)
        problems.add(
            one.where,
            f"{one.name}: the backslashes of this path were read as control characters. Use single quotes, "
            f"{one.name} = '{plain}', or forward slashes, {one.name} = \"{plain.replace(chr(92), '/')}\".",
        )
        return UNSET
    if ";" in value and not os.path.exists(value):
        parts = [part.strip() for part in value.split(";") if part.strip()]
        if len(parts) > 1:
            return [_paths(part, one, model, problems) for part in parts]
    return _absolute(value, one.folder, model)


def _absolute(text: str, folder: Path, model: bool) -> str:
    path = os.path.expanduser(text)
    absolute = os.path.normpath(os.path.join(folder, path))
    if model and not os.path.exists(absolute) and _reads_like_a_name(text):
        return text
    return absolute


def _reads_like_a_name(text: str) -> bool:
    """A hub id (owner/name), `latest`, `none`: no path unless something of that name is there."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None and not text.endswith(
        (".safetensors", ".gguf", ".parquet", ".pt", ".ckpt", ".bin")
    )


def one_level(given: Iterable[Given], problems: Problems) -> Scope:
    """Keys of one file scope, or of the command line. The same key twice is an error."""
    scope: Scope = {}
    for one in given:
        before = scope.get(one.name)
        if before is not None:
            problems.add(
                one.where, f"{one.spelled} says the same as {before.spelled} ({before.place}). Keep one of them."
            )
        scope[one.name] = one
    for group in EXCLUSIVE:
        both = [scope[name] for name in group if _says_something(scope, name)]
        if len(both) == 2 and both[1].value != both[0].value and both[1].value != [both[0].value]:
            problems.add(
                both[1].where,
                f"{both[1].spelled} = {show(both[1].value)} and {both[0].spelled} = {show(both[0].value)} "
                f"({both[0].place}) say one thing in two ways. Keep one of them.",
            )
    return scope


def _says_something(scope: Scope, name: str) -> bool:
    return name in scope and scope[name].value is not UNSET and scope[name].value != []


def stack(levels: Iterable[Scope]) -> Scope:
    """Later levels win, key by key. Of keys that exclude each other a later level drops the earlier ones."""
    merged: Scope = {}
    for level in levels:
        for group in EXCLUSIVE:
            if any(_says_something(level, name) for name in group):
                for name in group:
                    merged.pop(name, None)
        merged.update(level)
    return merged


def rewrite(scope: Scope, problems: Problems) -> Scope:
    """Turn InFluxEdit's and kohya's other ways of saying things into keys; drop what was unset."""
    plain = {name: one for name, one in scope.items() if one.value is not UNSET and name not in REWRITES}
    for name, one in scope.items():
        if name not in REWRITES or one.value is UNSET:
            continue
        for new in REWRITES[name].apply(one):
            before = plain.get(new.name)
            if before is None or _gives_way(before, new, REWRITES[name]):
                plain[new.name] = new
            elif before.value != new.value and not _wins(before, new):
                problems.add(
                    new.where,
                    f"{name} = {show(one.value)} means {new.name} = {show(new.value)}, "
                    f"but {before.spelled} = {show(before.value)} ({before.place}). Keep one of them.",
                )
    return plain


def _gives_way(before: Given, new: Given, how: Rewrite) -> bool:
    replaceable = str(before.value).lower() in how.replaces
    return replaceable or (not how.replaces and new.from_command_line and not before.from_command_line)


def _wins(before: Given, new: Given) -> bool:
    return before.from_command_line and not new.from_command_line
