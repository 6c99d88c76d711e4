"""What previews are asked for: prompts with sizes, seeds, condition images and masks, in kohya's formats.

Read without torch by the caching command, which encodes them, and by the trainer, which checks that it did.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from library.config.tables import SamplingTable
from library.config.tables.inference import LONGEST_SIDE
from library.data.report import Report
from library.errors import ConfigError, DataError



@dataclass(frozen=True)
class PreviewRequest:
    """One preview. None means the run's own value; sizes are those of what the model sees.

    copy: the how-many-eth of several with one prompt; its seed is that much higher.
    from_data: without an image of its own it starts from the first item of the data, as validation_prompt does.
    """

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    image: Path | None = None
    mask: Path | None = None
    mode: str | None = None
    copy: int = 0
    from_data: bool | None = None


OPTIONS: dict[str, tuple[str, type]] = {
    "w": ("width", int), "h": ("height", int), "d": ("seed", int), "s": ("steps", int), "g": ("guidance", float),
    "l": ("cfg_scale", float), "n": ("negative", str), "ci": ("image", Path), "mask": ("mask", Path),
    "mode": ("mode", str),
}  # fmt: skip
KEYS: dict[str, str] = {
    "prompt": "prompt", "negative_prompt": "negative", "width": "width", "height": "height", "seed": "seed",
    "sample_steps": "steps", "guidance_scale": "guidance", "scale": "cfg_scale", "ci": "image",
    "condition_image": "image", "image": "image", "mask": "mask", "mode": "mode",
}  # fmt: skip
TYPES = {field: kind for field, kind in OPTIONS.values()} | {"prompt": str}


def preview_requests(table: SamplingTable, report: Report | None = None) -> tuple[PreviewRequest, ...]:
    """All previews of a run. What is wrong goes to the caller's report; without one, DataError lists all of it."""
    found = Report()
    requests: list[PreviewRequest] = []
    if table.sample_prompts is not None:
        try:
            requests += _from_file(table.sample_prompts, found)
        except DataError as error:
            found.bad(table.sample_prompts.name, str(error))
    requests += _from_validation(table)
    there = []
    for request in requests:
        paths = (("--ci", request.image), ("--mask", request.mask))
        missing = [f"{role} {path}" for role, path in paths if path is not None and not path.is_file()]
        for lost in missing:
            found.bad(request.prompt[:60] or "a preview", f"{lost} does not exist")
        there += [] if missing else [request]
    lost = [replace(problem, skippable=False) for problem in found.problems]
    if report is None:
        Report(lost).stop_if_bad(False)
    else:
        report.problems += lost
    return tuple(there)


def _from_file(path: Path, report: Report) -> Iterator[PreviewRequest]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"sample_prompts = {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"sample_prompts = {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    reader = {".toml": _from_toml, ".json": _from_json}.get(path.suffix.lower(), _from_lines)
    yield from reader(text, path, report)


def _from_lines(text: str, path: Path, report: Report) -> Iterator[PreviewRequest]:
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            yield parse_line(line, path.parent)
        except ValueError as error:
            report.bad(f"{path.name} line {number}", str(error))


def parse_line(line: str, folder: Path) -> PreviewRequest:
    """A prompt with kohya's options. Raises ValueError for an unknown option or a value that is none."""
    prompt, *options = re.split(r"(?:^|\s+)--(?=[a-z])", line)
    values: dict[str, object] = {"prompt": prompt.strip()}
    for option in options:
        name, _, value = option.partition(" ")
        if name not in OPTIONS:
            raise ValueError(f"--{name} is unknown; there are {', '.join(f'--{known}' for known in OPTIONS)}")
        values[OPTIONS[name][0]] = _typed(f"--{name}", value.strip(), OPTIONS[name][1], folder)
    return _checked(PreviewRequest(**values))


def _typed(name: str, value: object, kind: type, folder: Path) -> object:
    if kind is Path:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} = {value!r} is no path")
        return folder / value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} = {value!r} is no text")
        return value
    try:
        number = kind(value) if isinstance(value, str | int) or kind is float else None
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r} is no {'whole number' if kind is int else 'number'}")
    return number


def _checked(request: PreviewRequest) -> PreviewRequest:
    for name in ("width", "height"):
        side = getattr(request, name)
        if side is not None and not 16 <= side <= LONGEST_SIDE:
            raise ValueError(f"{name} = {side} is not between 16 and {LONGEST_SIDE}")
    if request.steps is not None and request.steps < 1:
        raise ValueError(f"steps = {request.steps} is not at least 1")
    return request


def _from_toml(text: str, path: Path, report: Report) -> Iterator[PreviewRequest]:
    try:
        content = tomllib.loads(text).get("prompt", {})
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"sample_prompts = {path} is not TOML: {error}") from error
    subsets = content.pop("subset", None) if isinstance(content, dict) else None
    if not isinstance(subsets, list):
        raise DataError(f"sample_prompts = {path}: needs [prompt] with [[prompt.subset]] tables")
    yield from _from_tables([{**content, **subset} for subset in subsets], path, report)


def _from_json(text: str, path: Path, report: Report) -> Iterator[PreviewRequest]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"sample_prompts = {path} is not JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"sample_prompts = {path}: needs a list of objects")
    yield from _from_tables(content, path, report)


def _from_tables(tables: list[dict], path: Path, report: Report) -> Iterator[PreviewRequest]:
    for number, table in enumerate(tables, start=1):
        try:
            unknown = [name for name in table if name not in KEYS]
            if unknown:
                raise ValueError(f"{', '.join(unknown)} unknown; there are {', '.join(KEYS)}")
            values = {KEYS[name]: _typed(name, value, TYPES[KEYS[name]], path.parent) for name, value in table.items()}
            yield _checked(PreviewRequest(**{"prompt": "", **values}))
        except ValueError as error:
            report.bad(f"{path.name} prompt {number}", str(error))


def _from_validation(table: SamplingTable) -> list[PreviewRequest]:
    """The seed's validation_prompt, validation_image and validation_mask: one of each per preview, or one for all."""
    lists = {
        "validation_prompt": table.validation_prompt,
        "validation_image": table.validation_image,
        "validation_mask": table.validation_mask,
    }
    if not table.validation_prompt:
        return []
    count = max(len(values) for values in lists.values())
    for name, values in lists.items():
        if len(values) not in (0, 1, count):
            raise ConfigError(f"{name} has {len(values)} entries, but another list has {count}: give one, or {count}")
    spread = [list(values) * (count // len(values)) if values else [None] * count for values in lists.values()]
    size = {"width": table.validation_width, "height": table.validation_height}
    single = [
        PreviewRequest(prompt, image=image, mask=mask, from_data=None if image else True, **size)
        for prompt, image, mask in zip(*spread, strict=True)
    ]
    return [replace(request, copy=copy) for request in single for copy in range(table.num_validation_images)]


def plain(request: PreviewRequest) -> dict:
    """A request as JSON."""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    given = {name: value for name, value in values.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def from_plain(content: dict) -> PreviewRequest:
    """The request that `plain` wrote."""
    paths = {name: Path(content[name]) for name in ("image", "mask") if name in content}
    return PreviewRequest(**{**content, **paths})
