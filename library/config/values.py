"""What a key's type is called, and how the command line's text is read as it."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from library.config.table import KeyInfo

CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_SHORT = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}


def options(annotation: Any) -> list[Any]:
    """A type without None and without the wrappers around it: the things a value may be."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in options(part)]
    return [] if annotation is type(None) else [annotation]


def element(option: Any) -> list[Any] | None:
    """The element types of a list, or None if this is no list."""
    if get_origin(option) is not tuple:
        return None
    return options(get_args(option)[0])


def is_pair(option: Any) -> bool:
    """Whether this is a list of fixed length, as [width, height]."""
    return get_origin(option) is tuple and get_args(option)[-1] is not Ellipsis


def takes_list(annotation: Any) -> bool:
    """Whether several values may follow the key on the command line."""
    return any(get_origin(option) is tuple for option in options(annotation))


def is_bool(annotation: Any) -> bool:
    """Whether the key alone means true."""
    return bool in options(annotation)


def choices(annotation: Any) -> list[str]:
    """The words a key accepts, if it accepts only these (also inside a list)."""
    words: list[str] = []
    for option in options(annotation):
        for part in element(option) or [option]:
            if get_origin(part) is Literal:
                words.extend(str(word) for word in get_args(part))
    return words


def _name_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(get_args(option)) if len(get_args(option)) > 1 else f'"{get_args(option)[0]}"'
    inner = element(option)
    if inner is None:
        return _NAMES[option]
    if is_pair(option):
        return "[low, high]" if inner == [float] else "[width, height]"
    return "a list: " + " or ".join(_name_of(part) for part in inner)


def describe(field: FieldInfo, info: KeyInfo) -> str:
    """What a value has to be, in words."""
    text = " or ".join(_name_of(option) for option in options(field.annotation))
    return f"{text}, {info.range}" if info.range else text


def short_type(annotation: Any) -> str:
    """The type as the help and the reference write it."""
    words = []
    for option in options(annotation):
        if get_origin(option) is Literal:
            words.append("|".join(get_args(option)))
        elif is_pair(option):
            words.append("[low, high]" if element(option) == [float] else "[w, h]")
        elif element(option) is not None:
            words.append("list of " + "|".join(short_type(part) for part in element(option) or []))
        else:
            words.append(_SHORT[option])
    return "|".join(words)


def show(value: object) -> str:
    """A value as TOML would write it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(part) for part in value) + "]"
    elif isinstance(value, (str, Path)):
        text = json.dumps(str(value), ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def closest(word: str, words: list[str]) -> str:
    """A 'did you mean' for a misspelt word, or nothing."""
    lower = {known.lower(): known for known in words}
    found = difflib.get_close_matches(word.lower(), list(lower), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(lower[name] for name in found)}?" if found else ""


def from_text(parts: list[str], field: FieldInfo, info: KeyInfo) -> object:
    """Read command-line text as the key's type. What cannot be read stays text, and is refused later by its type."""
    kinds = options(field.annotation)
    if len(parts) == 1 and parts[0].lstrip().startswith("[") and takes_list(field.annotation):
        return _array(parts[0])
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    if not lists or (len(parts) == 1 and len(lists) < len(kinds)):
        return _scalar(parts[0], kinds)
    inner = element(lists[0]) or []
    return [_scalar(piece, inner) for part in parts for piece in split(part, info)]


def split(text: str, info: KeyInfo) -> list[str]:
    """The pieces of a list written as one string. A comma splits only where no entry can hold one."""
    pieces = re.split("[;,]" if info.comma else ";", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _array(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _scalar(text: str, kinds: list[Any]) -> object:
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def hint(value: object, field: FieldInfo) -> str:
    """How to mend the commonest slips of type."""
    kinds = options(field.annotation)
    if isinstance(value, str):
        read = _scalar(value.strip(), kinds)
        if not isinstance(read, str) and (isinstance(read, (bool, int)) or math.isfinite(read)):
            return f" Write it without quotes: {show(read)}."
        words = choices(field.annotation)
        return closest(value, words)
    if isinstance(value, bool):
        return ""
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f" Write {int(value)}."
    if isinstance(value, (int, float)) and kinds == [bool]:
        return f" Write {'true' if value else 'false'}."
    if isinstance(value, (int, float)) and str in kinds:
        return f' Write it in quotes: "{value}".'
    return ""
