"""Merging networks into a base checkpoint's file, tensor by tensor: the new file has the old one's names and precision.

Nothing but the tensor at hand is in memory. BFL single files and diffusers folders (sharded or not) are understood by
their names alone.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import ModelError, NetworkFileError
from library.files import atomic_folder, atomic_write
from library.models.keymap import strip_prefix
from library.networks import parts
from library.networks.change import Change
from library.networks.factors import Factors
from library.networks.inheritance import WITHOUT_TEXT
from library.networks.parts import Rows
from library.tensorfile import Header, TensorInfo, read_header

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bake(source: Path, target: Path, networks: Sequence[tuple[Change, float]]) -> int:
    """Write ``source`` with the networks merged in to ``target``: a file, or a folder of a diffusers transformer.

    Returns how many tensors changed. Raises ModelError if a changed weight is missing or is stored quantised,
    NetworkFileError if a network changes CLIP-L, which is not in such a file.
    """
    texts = sum(len(change.text) for change, _ in networks)
    if texts:
        raise NetworkFileError(
            f"{texts} modules of the networks belong to CLIP-L, which {source} does not hold: they would be lost."
            f" {WITHOUT_TEXT}"
        )
    if target.exists():
        raise ModelError(f"{target} exists already; nothing is overwritten")
    if source.is_dir():
        with atomic_folder(target) as folder:
            return _bake_folder(source, folder, networks)
    headers = {source: read_header(source)}
    _check_complete(headers, networks)
    return _bake_file(source, headers[source], target, networks)


def _bake_folder(source: Path, folder: Path, networks: Sequence[tuple[Change, float]]) -> int:
    headers = {path: read_header(path) for path in sorted(source.glob("*.safetensors"))}
    _check_complete(headers, networks)
    for path in source.iterdir():
        if path.is_file() and path not in headers:
            shutil.copyfile(path, folder / path.name)
    return sum(_bake_file(path, header, folder / path.name, networks) for path, header in headers.items())


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file belongs: a BFL module, the part of it (None: all), whether its halves are swapped.

    is_bias: whether it is the module's bias instead of its weight.
    """

    module: str
    part: int | None
    swapped: bool
    is_bias: bool


def _places(header: Header) -> dict[str, Place]:
    """The place of every linear's weight and bias in the file, by tensor name."""
    prefix = strip_prefix(list(header.tensors))
    found: dict[str, Place] = {}
    for name in header.tensors:
        stem, _, leaf = name.removeprefix(prefix).rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        if parts.is_known(stem):
            found[name] = Place(stem, None, False, leaf == "bias")
            continue
        try:
            module, index = parts.from_diffusers(stem)
        except KeyError:
            continue
        part = index if len(parts.diffusers_names(module)) > 1 else None
        found[name] = Place(module, part, module == parts.SWAPPED_HALVES, leaf == "bias")
    return found


def _check_complete(headers: dict[Path, Header], networks: Sequence[tuple[Change, float]]) -> None:
    places = {(place.module, place.is_bias) for header in headers.values() for place in _places(header).values()}
    for change, _ in networks:
        needed = {(module, False) for module, _ in change.entries} | {(module, True) for module in change.biases}
        missing = sorted(f"{module}.{'bias' if is_bias else 'weight'}" for module, is_bias in needed - places)
        if missing:
            raise ModelError(f"the checkpoint has no {', '.join(missing[:3])}, which the network changes")


def _bake_file(source: Path, header: Header, target: Path, networks: Sequence[tuple[Change, float]]) -> int:
    places, changed = _places(header), set()

    def write(temporary: Path) -> None:
        with open(source, "rb") as old, open(temporary, "wb") as new:
            shutil.copyfileobj(_Limited(old, header.data_start), new)
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                old.seek(info.begin)
                raw = old.read(info.end - info.begin)
                delta = _delta(places.get(name), info, raw, source, name, networks)
                if delta is not None:
                    changed.add(name)
                    raw = delta
                new.write(raw)

    atomic_write(target, write)
    return len(changed)


class _Limited:
    """The first bytes of a file, as `copyfileobj` reads them."""

    def __init__(self, file, size: int):
        self.file, self.left = file, size

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


def _delta(
    place: Place | None,
    info: TensorInfo,
    raw: bytes,
    source: Path,
    name: str,
    networks: Sequence[tuple[Change, float]],
) -> bytes | None:
    """The tensor's new bytes, or None if no network changes it."""
    if place is None:
        return None
    concerned = [
        (change, strength)
        for change, strength in networks
        if place.module in (change.biases if place.is_bias else change.sizes)
    ]
    if not concerned:
        return None
    if info.dtype not in _TYPES:
        raise ModelError(f"{source}: {name} is stored as {info.dtype}; merge into an unquantised checkpoint")
    weight = _ours(torch.frombuffer(bytearray(raw), dtype=_TYPES[info.dtype]).view(info.shape).float(), place)
    total = torch.zeros_like(weight)
    touched = False
    for change, strength in concerned:
        if place.is_bias:
            touched |= _add_bias(total, place, change.biases[place.module], strength)
            continue
        for rows, factors in change.by_module().get(place.module, []):
            touched |= _add(total, weight, place, rows, factors, strength)
    if not touched:
        return None
    merged = _ours(weight + total, place).to(_TYPES[info.dtype]).contiguous()
    return bytes(memoryview(merged.view(-1).view(torch.uint8).numpy()))


def _add_bias(total: Tensor, place: Place, bias: Tensor, strength: float) -> bool:
    """Add one network's change of the module's bias to what this tensor holds of it."""
    count = total.shape[0]
    is_last = place.part is not None and place.part == len(parts.diffusers_names(place.module)) - 1
    start = bias.shape[0] - count if is_last else (place.part or 0) * count
    total += bias[start : start + count].float() * strength
    return True


def _ours(weight: Tensor, place: Place) -> Tensor:
    """The weight with its halves in BFL's order, and back again."""
    return torch.cat(weight.chunk(2)[::-1]) if place.swapped else weight


def _add(total: Tensor, weight: Tensor, place: Place, rows: Rows, factors: Factors, strength: float) -> bool:
    """Add one network's change of ``rows`` of the BFL module to what this tensor holds of it; whether they meet."""
    start = 0 if place.part is None else place.part * weight.shape[1]
    low, high = max(rows[0], start), min(rows[1], start + weight.shape[0])
    if low >= high:
        return False
    base = torch.zeros(rows[1] - rows[0], weight.shape[1])
    base[low - rows[0] : high - rows[0]] = weight[low - start : high - start]
    delta = factors.to(torch.float32).delta(base) * strength
    total[low - start : high - start] += delta[low - rows[0] : high - rows[0]]
    return True
