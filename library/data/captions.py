"""Captions: read, refused or expanded into the variants that will be encoded.

Text is encoded once per distinct caption, so whatever changes a caption at random (tag order, dropout) is drawn here
and cached as variants; the trainer draws among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.data.chance import chance
from library.errors import DataError

LONGEST_FILE = 20_000  # bytes; T5 reads 512 tokens, some 2,500 letters


class BadCaption(DataError):
    """A caption that cannot be used; the message is the reason, without the item's name."""


@dataclass(frozen=True)
class CaptionSettings:
    """What is done to every caption of a subset."""

    prefix: str | None = None
    suffix: str | None = None
    separator: str = ","
    shuffle: bool = False
    variants: int = 1
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    allow_empty: bool = False
    per_line: bool = False
    seed: int = 0


def read_captions(path: Path, settings: CaptionSettings) -> tuple[str, ...]:
    """The caption of a file, or one per line if ``per_line``. Raises BadCaption with the reason."""
    data = path.read_bytes()
    if len(data) > LONGEST_FILE:
        raise BadCaption(f"{len(data)} bytes are no caption (at most {LONGEST_FILE})")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadCaption("is UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCaption(f"is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): save it as UTF-8") from error
    if not settings.per_line:
        return (checked(text, settings),)
    lines = [line for line in text.splitlines() if line.strip()]
    return tuple(checked(line, settings) for line in lines or [""])


def checked(text: str, settings: CaptionSettings) -> str:
    """The caption on one line, without blanks around it. Raises BadCaption for control characters or an empty text."""
    flat = " ".join(text.split())
    wrong = next((char for char in flat if ord(char) < 32 or ord(char) == 127 or "\ud800" <= char <= "\udfff"), None)
    if wrong is not None:
        raise BadCaption(f"holds the control character {wrong!r}")
    if not flat and not settings.allow_empty:
        raise BadCaption("the caption is empty (allow_empty_captions = true trains on it as it is)")
    return flat


def variants(caption: str, item_key: str, settings: CaptionSettings) -> tuple[str, ...]:
    """The texts to encode for one caption: with prefix and suffix, in every order that was asked for."""
    if not settings.shuffle and not settings.tag_dropout:
        return (_dressed(caption, settings),)
    made = [_shuffled(caption, item_key, number, settings) for number in range(settings.variants)]
    return tuple(dict.fromkeys(_dressed(text, settings) for text in made))


def _shuffled(caption: str, item_key: str, number: int, settings: CaptionSettings) -> str:
    draw = chance("tags", settings.seed, item_key, caption, number)
    tags = [tag.strip() for tag in caption.split(settings.separator)]
    kept, loose = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
    if settings.shuffle:
        draw.shuffle(loose)
    loose = [tag for tag in loose if draw.random() >= settings.tag_dropout]
    return f"{settings.separator.strip() or settings.separator} ".join([*kept, *loose])


def _dressed(caption: str, settings: CaptionSettings) -> str:
    return " ".join(part for part in (settings.prefix, caption, settings.suffix) if part)
