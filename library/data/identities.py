"""Hashes of the encoders' files, remembered by the files' stat: T5 alone is ten gigabytes."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

from library.errors import ModelError
from library.files import FileStat, atomic_write
from library.models.base import Base, Part

FILE = "identities.json"


def identity_of(base: Base, part: Part, folder: Path) -> str | None:
    """The identity of a part of the base, None if its files are not on this machine."""
    try:
        stats = {str(path): list(astuple(FileStat.of(path))) for path in base.files(part)}
    except (ModelError, OSError):
        return None
    known = _read(folder / FILE)
    spelled = json.dumps(stats, sort_keys=True)
    if known.get(spelled) is None:
        known = {**known, spelled: base.identity(part)}
        if folder.is_dir():
            atomic_write(folder / FILE, json.dumps(known, indent=1))
    return known[spelled]


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}
