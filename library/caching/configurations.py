"""The configurations a cache folder knows: what each was made of, where it differs, and giving one up.

A configuration is remembered by its manifest. While it is, --gc keeps all it names: a resolution tried once would fill
the disk for ever if nobody could see it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.caching.session import Session
from library.data.manifest import config_hash, differences, manifests
from library.errors import CacheError

SHOWN_NAME = 8  # letters of 32
MOST_DIFFERENCES = 4
LONGEST = 110


@dataclass(frozen=True)
class Configuration:
    """One manifest. entries: what it counts on. differing: "key: there -> here", none for the present one."""

    path: Path
    cached_at: float
    num_items: int
    subsets: tuple[str, ...]
    entries: frozenset[str]
    differing: tuple[str, ...]
    is_present: bool

    @property
    def name(self) -> str:
        """How the user names it: the beginning of its hash."""
        return self.path.stem[:SHOWN_NAME]


def configurations(session: Session) -> list[Configuration]:
    """All of them, the newest first."""
    here = json.loads(json.dumps(session.scope.config))
    own = config_hash(session.scope.config)
    return [
        Configuration(
            path,
            path.stat().st_mtime,
            len(content["items"]),
            tuple(content["subsets"]),
            _entries(content),
            tuple(differences(content["config"], here)),
            path.stem == own,
        )
        for path, content in manifests(session.scope.folder)
    ]


def _entries(content: dict) -> frozenset[str]:
    images = {one for item in content["items"] for choices in item[3] for one in choices}
    return frozenset(images | {text[0] for text in content["texts"]} | {preview[2] for preview in content["previews"]})


def lines(known: Sequence[Configuration]) -> Iterator[str]:
    """For people: each configuration, and where the others differ from the present one."""
    if known:
        yield f"configurations in this cache: {len(known)}"
    for one in known:
        others = frozenset[str]().union(*(other.entries for other in known if other is not one))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.cached_at))
        yield (
            f"  {one.name}  {when}  {one.num_items} items of {', '.join(one.subsets)}; "
            f"{len(one.entries - others)} entries that only it names"
            + (" (the present configuration)" if one.is_present else "")
        )
        if one.is_present:
            continue
        for text in one.differing[:MOST_DIFFERENCES]:
            yield f"    there -> here: {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
        if len(one.differing) > MOST_DIFFERENCES:
            yield f"    ... and {len(one.differing) - MOST_DIFFERENCES} more differences"
    if any(not one.is_present for one in known):
        yield "  --gc keeps what any of them names; --gc --give_up NAME forgets one first"


def chosen(known: Sequence[Configuration], names: Sequence[str]) -> list[Configuration]:
    """The configurations that the user gives up. Raises CacheError for a name that is not exactly one other's."""
    found = []
    for name in names:
        meant = [one for one in known if one.path.stem.startswith(name)]
        if len(meant) != 1 or meant[0].is_present:
            reason = "is the present one" if len(meant) == 1 else f"means {len(meant)} of them"
            others = ", ".join(one.name for one in known if not one.is_present) or "none"
            raise CacheError(f"give_up = {name} {reason}. Configurations that can be given up: {others}")
        found += meant
    return found
