"""`resume` names a state to go back to: when it is taken up, and what becomes of what was made after it.

It is taken up once: the same command again goes on from what followed it. What the folder holds of later steps is
another timeline then; it is moved to a folder of its own, so that nothing is overwritten and neither is taken for the
other.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from library.files import sha256_file
from library.previews import FOLDER
from library.training import saving, state
from library.training.metrics import FILE as METRICS
from library.training.run_folder import Record
from library.training.state import StateError

log = logging.getLogger(__name__)
ASIDE = "set-aside"
REPORT = "report.html"


@dataclass(frozen=True)
class Origin:
    """The state to continue from. back: it is the one that `resume` names, with its fingerprint, path and step."""

    folder: Path | None = None
    back: dict[str, object] | None = None


def origin(wanted: str | None, folder: Path, name: str, record: Record | None) -> Origin:
    """The state to continue from: the newest whole one of this run, unless `wanted` names one that nothing followed."""
    resumed = record.resumed if record is not None else None
    if wanted in (None, "latest"):
        found = _newest(folder, name)
        if resumed is not None and (found is None or _step(found) <= resumed["step"]):
            named = Path(str(resumed["path"]))  # in another folder, and no state was written since
            if _fingerprint(named) == resumed["state"]:
                return Origin(named)
        return Origin(found)
    named = Path(str(wanted)) if Path(str(wanted)).exists() else folder / str(wanted)
    if not named.exists():
        if resumed is not None and resumed["path"] == str(named.absolute()):
            return Origin(_newest(folder, name))
        raise StateError(f"resume = {wanted}: there is no such folder")
    back = {"state": _fingerprint(named), "path": str(named.absolute()), "step": _step(named)}
    if resumed is not None and resumed["state"] == back["state"]:
        found = _newest(folder, name)
        if found is not None and _step(found) > back["step"]:
            return Origin(found)
    return Origin(named, back)


def _newest(folder: Path, name: str) -> Path | None:
    found, troubles = state.newest(folder, name)
    for trouble in troubles:
        log.warning("state left out: %s", trouble)
    return found


def _step(folder: Path) -> int:
    return int(state.read_scalars(folder)["step"])


def _fingerprint(folder: Path) -> str | None:
    manifest = folder / saving.MANIFEST
    return sha256_file(manifest) if manifest.is_file() else None


def set_aside(folder: Path, name: str, step: int, epoch: int) -> Path | None:
    """Move what a run made after `step` to a folder of its own, under its own names; returns it if there was any."""
    later = _later(folder, name, step, epoch)
    if not later:
        return None
    number = 1
    while (folder / f"{ASIDE}-{number}").exists():
        number += 1
    target = folder / f"{ASIDE}-{number}"
    for path in later:
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    for path in [*folder.glob(f"{name}-best*"), folder / METRICS, folder / REPORT]:
        if path.is_file():
            shutil.copy2(path, target / path.name)
    log.info("going back to step %d: what was made after it is kept in %s", step, target)
    return target


def _later(folder: Path, name: str, step: int, epoch: int) -> list[Path]:
    """States first, so that a kill in between leaves none of them to be taken for the newest."""
    found = []
    for path in sorted(folder.glob("*" + saving.STATE_SUFFIX)):
        try:
            scalars = state.read_scalars(path)
        except StateError:
            continue  # never taken up in any case
        if scalars["output_name"] == name and int(scalars["step"]) > step:
            found.append(path)
    ended = bool(found) or not (folder / f"{name}{saving.STATE_SUFFIX}").exists()
    for path, kind, count in saving.saved(folder, name, is_state=False):
        if count > (step if kind == "step" else epoch):
            found.append(path)
    plain = re.compile(re.escape(name) + saving.ENDING)
    found += [path for path in sorted(folder.iterdir()) if ended and path.is_file() and plain.fullmatch(path.name)]
    pictures = re.compile(re.escape(name) + r"_\w+_(\d{8})\.png")
    for path in sorted((folder / FOLDER).glob("*.png")):
        match = pictures.fullmatch(path.name)
        if match is not None and int(match[1]) > step:
            found.append(path)
    return found
