"""The page as a file: everything in it, nothing from outside, read by the browser only as far as it is looked at.

Pictures come in chunks of JSON that the page parses when one of them is scrolled into sight; whatever the user's files
and captions say is data in JSON, never markup.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from library.caching.preview.cards import Card
from library.data.lint import KINDS
from library.files import atomic_write

if TYPE_CHECKING:
    from library.caching.preview.decoded import Shown

HERE = Path(__file__).parent
CHUNK = 24  # items whose pictures are parsed at once


@dataclass(frozen=True)
class Heading:
    """What the page is of: the configuration's file, the cache's folder, the base's name."""

    config: str
    cache: str
    base: str


def write_page(path: Path, heading: Heading, cards: list[Card], pictures: Iterable[tuple[int, Shown]]) -> None:
    """Write the page. pictures: of some cards, by number, in any order; written as they come."""

    def fill(temporary: Path) -> None:
        start, end = (HERE / "page.html").read_text(encoding="utf-8").split("<!--DATA-->")
        style = (HERE / "page.css").read_text(encoding="utf-8")
        script = (HERE / "page.js").read_text(encoding="utf-8")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(start.replace("/*STYLE*/", style))
            places = _write_chunks(file, pictures)
            values = [_values(card, places.get(number)) for number, card in enumerate(cards)]
            _write_data(file, 'id="data"', {**_described(heading, len(places)), "items": values})
            file.write(end.replace("/*SCRIPT*/", script))

    atomic_write(path, fill)


def _write_chunks(file: TextIO, pictures: Iterable[tuple[int, Shown]]) -> dict[int, tuple[int, int]]:
    """Write all pictures; returns chunk and place of each card's."""
    places: dict[int, tuple[int, int]] = {}
    chunk: list[dict] = []
    for number, shown in pictures:
        places[number] = (len(places) // CHUNK, len(chunk))
        chunk.append(asdict(shown))
        if len(chunk) == CHUNK:
            _write_data(file, f'id="pictures-{places[number][0]}"', chunk)
            chunk = []
    if chunk:
        _write_data(file, f'id="pictures-{(len(places) - 1) // CHUNK}"', chunk)
    return places


def _write_data(file: TextIO, attribute: str, content: object) -> None:
    """A script element of JSON. "<" is spelled as an escape: it could end the element."""
    spelled = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    file.write(f'<script type="application/json" {attribute}>{spelled}</script>\n')


def _described(heading: Heading, num_pictures: int) -> dict:
    return {
        "config": Path(heading.config).name,
        "cache": heading.cache,
        "base": heading.base,
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "pictures": num_pictures,
        "kinds": [[name, kind.title, kind.advice] for name, kind in KINDS.items()],
    }


def _values(card: Card, place: tuple[int, int] | None) -> dict:
    return {
        "name": card.name,
        "subset": card.subset,
        "mode": card.mode,
        "captions": [[text.caption, text.lost] for text in card.captions],
        "sizes": card.sizes,
        "variants": card.variants,
        "masks": card.masks,
        "cropped": round(card.cropped, 4),
        "enlarged": round(card.enlarged, 3),
        "changed": None if card.changed is None else round(card.changed, 4),
        "heldOut": card.held_out,
        "warnings": [[finding.kind, finding.message] for finding in card.findings],
        "place": place,
    }
