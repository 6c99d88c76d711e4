"""Which pictures a call edits, with which masks and prompts: looked up and checked before anything slow starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.conditioning import Mode
from library.config.tables import InferenceTable
from library.data.geometry import same_aspect
from library.data.images import EXTENSIONS, BadImage, inspect
from library.errors import DataError
from library.sampling.fit import MAX_PIXELS

SHOWN = 10


@dataclass(frozen=True)
class Picture:
    """One picture to edit. size: (width, height), upright."""

    path: Path
    size: tuple[int, int]
    mask: Path | None
    prompt: str


def find_pictures(table: InferenceTable, mode: Mode) -> tuple[list[Picture], list[str]]:
    """Every picture the table names, in the order of their names, and notes about what was left out.

    Raises DataError listing all that is wrong at once.
    """
    if table.image is None:
        raise DataError("no picture to edit: give a file or a folder with --image")
    if table.mask is not None and "mask" not in mode.takes:
        raise DataError(f"mode {mode.name} takes no mask ({table.mask}): it makes its own")
    if table.mask is None and "mask" in mode.needs:
        raise DataError(f"mode {mode.name} needs a mask (white is repainted): give a file or a folder with --mask")
    paths, notes = _images_in(table.image)
    prompts = _prompts(table, paths)
    masks = _masks(table.mask, paths)
    problems: list[str] = []
    pictures = []
    for path, prompt, mask in zip(paths, prompts, masks):
        picture, problem = _checked(path, prompt, mask)
        problems += [problem] if problem else []
        pictures += [picture] if picture else []
    if problems:
        raise DataError(_listed(f"{len(problems)} of {len(paths)} pictures cannot be edited", problems))
    return pictures, notes


def _images_in(given: Path) -> tuple[list[Path], list[str]]:
    if given.is_file():
        return [given], []
    if not given.is_dir():
        raise DataError(f"there is no image or folder {given}: check the path given as image")
    entries = sorted(path for path in given.iterdir() if not path.name.startswith("."))
    images = [path for path in entries if path.is_file() and path.suffix.lower() in EXTENSIONS]
    if not images:
        raise DataError(f"the folder {given} holds no images ({', '.join(sorted(EXTENSIONS))})")
    others = [path.name for path in entries if path.is_file() and path not in images]
    return images, [f"left out, no images: {', '.join(others[:SHOWN])}"] if others else []


def _prompts(table: InferenceTable, paths: list[Path]) -> list[str]:
    if table.prompt and table.prompt_dir:
        raise DataError("prompt and prompt_dir are both given: choose one")
    if table.prompt_dir:
        return _prompts_from(table.prompt_dir, paths)
    if not table.prompt:
        raise DataError("no prompt: say what to do with --prompt, or name a folder of text files with --prompt_dir")
    if len(table.prompt) not in (1, len(paths)):
        raise DataError(
            f"{len(table.prompt)} prompts for {len(paths)} pictures: give one for all, or one for each in the order of "
            "their names (prompts are separated by `;`)"
        )
    return list(table.prompt) * (len(paths) // len(table.prompt))


def _prompts_from(folder: Path, paths: list[Path]) -> list[str]:
    prompts, problems = [], []
    for path in paths:
        file = folder / f"{path.stem}.txt"
        try:
            prompts.append(file.read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            problems.append(f"{path.name}: there is no {file}")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path.name}: {file} cannot be read as UTF-8 text ({error})")
    if problems:
        raise DataError(_listed(f"{len(problems)} of {len(paths)} prompts are missing", problems))
    return prompts


def _masks(given: Path | None, paths: list[Path]) -> list[Path | None]:
    """Each picture's mask: the one file, or the file of the same stem in the folder (named even if it is not there)."""
    if given is None or given.is_file():
        return [given] * len(paths)
    if not given.is_dir():
        raise DataError(f"there is no mask or folder {given}: check the path given as mask")
    by_stem = {path.stem: path for path in sorted(given.iterdir()) if path.suffix.lower() in EXTENSIONS}
    return [by_stem.get(path.stem, given / f"{path.stem}.png") for path in paths]


def _checked(path: Path, prompt: str, mask: Path | None) -> tuple[Picture | None, str | None]:
    """The picture, or what is wrong with it."""
    try:
        size = _size(path)
    except DataError as error:
        return None, f"{path.name}: {error}"
    if mask is None:
        return Picture(path, size, None, prompt), None
    try:
        mask_size = _size(mask)
    except DataError as error:
        return None, f"{path.name}: its mask {mask.name}: {error}"
    if not same_aspect(size, mask_size):
        return None, f"{path.name} is {size[0]}x{size[1]}, its mask {mask.name} {mask_size[0]}x{mask_size[1]}"
    return Picture(path, size, mask, prompt), None


def _size(path: Path) -> tuple[int, int]:
    try:
        facts = inspect(path.read_bytes(), MAX_PIXELS)
    except FileNotFoundError as error:
        raise BadImage(f"there is no file {path}") from error
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error
    return facts.width, facts.height


def _listed(headline: str, problems: Iterable[str]) -> str:
    lines = list(problems)
    shown = [f"  {line}" for line in lines[:SHOWN]]
    rest = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{headline}:", *shown, *rest])
