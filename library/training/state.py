"""State folders: everything a run needs to go on bit for bit, in safetensors and JSON, with a hash of every file.

A folder is written aside and renamed, so a kill leaves a whole one or none; what was damaged afterwards is found by
its hashes, and the newest folder that is whole is used.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from library.errors import DiskError, UserError
from library.files import atomic_folder, sha256_file
from library.training.saving import MANIFEST, STATE_SUFFIX

FORMAT = 1
SCALARS = "state.json"
_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"


class StateError(UserError):
    """A state folder that is damaged, incomplete or of another format."""


@dataclass(frozen=True)
class RunState:
    """What a state folder holds: tensors by part and name, and everything else as JSON."""

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, object] = field(default_factory=dict)


def flatten(value: object, prefix: str, tensors: dict[str, Tensor]) -> object:
    """Replace every tensor in nested dicts, lists and tuples by its name; the rest must be plain JSON values."""
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {_TENSOR: prefix}
    if isinstance(value, dict):
        items = [[key, flatten(item, f"{prefix}/{key}", tensors)] for key, item in value.items()]
        return {_ITEMS: items}  # a list of pairs, because JSON turns integer keys into strings
    if isinstance(value, list | tuple):
        flat = [flatten(item, f"{prefix}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: flat} if isinstance(value, tuple) else flat
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{prefix} is a {type(value).__name__}, which a state without pickle cannot hold")


def unflatten(skeleton: object, tensors: dict[str, Tensor]) -> object:
    """The inverse of `flatten`."""
    if isinstance(skeleton, list):
        return [unflatten(item, tensors) for item in skeleton]
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return tensors[skeleton[_TENSOR]]
        if _TUPLE in skeleton:
            return tuple(unflatten(item, tensors) for item in skeleton[_TUPLE])
        return {key: unflatten(item, tensors) for key, item in skeleton[_ITEMS]}
    return skeleton


def save(folder: Path, state: RunState) -> None:
    """Write `folder` whole or not at all; an older folder of the same name is replaced."""
    retired = folder.with_name(folder.name + ".old")
    with _making_room(folder, retired), atomic_folder(folder) as temporary:
        for part, tensors in state.tensors.items():
            plain = {name: _plain(tensor) for name, tensor in tensors.items()}
            _write(plain, temporary / f"{part}.safetensors", folder)
        scalars = {"format": FORMAT, **state.scalars}
        (temporary / SCALARS).write_text(json.dumps(scalars, indent=1, allow_nan=True), encoding="utf-8")
        hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")


def _write(tensors: dict[str, Tensor], path: Path, folder: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the library's own word for a full disk
        raise DiskError(f"cannot write {folder}: {error}; free some space or choose another output_dir") from error


class _making_room:
    """Moves a folder of the same name aside for the time of writing its successor, and removes it afterwards."""

    def __init__(self, folder: Path, retired: Path):
        self.folder, self.retired = folder, retired

    def __enter__(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.retired, ignore_errors=True)
            self.folder.rename(self.retired)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None and self.retired.exists() and not self.folder.exists():
            self.retired.rename(self.folder)
        shutil.rmtree(self.retired, ignore_errors=True)


def _plain(tensor: Tensor) -> Tensor:
    # a clone also for CPU tensors: safetensors refuses two names for one memory, which optimizers' states may have
    return tensor.detach().to("cpu", copy=True).contiguous()


def load(folder: Path) -> RunState:
    """Read a state folder whose hashes all agree. Raises StateError otherwise."""
    scalars = read_scalars(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors[file.stem] = load_bytes(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise StateError(f"cannot read {file}: {error}") from error
    return RunState(tensors, scalars)


def read_scalars(folder: Path) -> dict[str, object]:
    """The JSON part of a state folder, after checking every file's hash."""
    manifest = _json(folder / MANIFEST)
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            raise StateError(f"{folder} is incomplete: {name} is missing")
        if sha256_file(path) != expected:
            raise StateError(f"{folder} is damaged: {name} does not have the hash it was written with")
    scalars = _json(folder / SCALARS)
    if scalars.get("format") != FORMAT:
        raise StateError(f"{folder} has format {scalars.get('format')!r}; this version reads format {FORMAT}")
    return scalars


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StateError(f"{path.parent} is no whole state folder: it has no {path.name}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise StateError(f"{path} does not hold an object")
    return value


def newest(output_dir: Path, name: str) -> tuple[Path | None, list[str]]:
    """The newest whole state folder of the run called `name`, and what is wrong with newer ones that were skipped.

    Sweeps nothing: a folder that was set aside while its successor was written (`.old`) counts as well.
    """
    found, troubles = [], []
    for folder in sorted(output_dir.glob("*" + STATE_SUFFIX)) + sorted(output_dir.glob("*" + STATE_SUFFIX + ".old")):
        if not folder.is_dir():
            continue
        try:
            scalars = _json(folder / SCALARS)
        except StateError as error:
            troubles.append(str(error))
            continue
        if scalars.get("output_name") == name:
            found.append((int(scalars.get("step", -1)), folder))
    for _, folder in sorted(found, key=lambda pair: (pair[0], pair[1].suffix != ".old"), reverse=True):
        try:
            read_scalars(folder)
        except StateError as error:
            troubles.append(str(error))
            continue
        return folder, troubles
    return None, troubles


def optimizer_tensors(states: list[dict]) -> tuple[dict[str, Tensor], object]:
    """Optimizers' state dicts -> tensors by name and a JSON skeleton."""
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(states, "o", tensors)
    return tensors, skeleton


def optimizer_states(tensors: dict[str, Tensor], skeleton: object) -> list[dict]:
    """The inverse of `optimizer_tensors`; safetensors keeps 0-dim tensors and dtypes as they were."""
    states = unflatten(skeleton, tensors)
    assert isinstance(states, list)
    return states
