"""What the chosen network files say about how they want to be used, read from their headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from library.config.tables import InferenceTable, NetworkTable
from library.errors import NetworkFileError
from library.networks.metadata import Guide, guide
from library.tensorfile import read_header

NO_NETWORK = "none"
_OWN = "train first (influx_train.py), name a file with --lora, or use the base alone with --lora none"


@dataclass(frozen=True)
class NetworkUse:
    """One network file, how strongly it is applied, and what it says about itself."""

    path: Path
    strength: float
    guide: Guide


def networks_of(table: InferenceTable, network: NetworkTable, own_result: Path) -> tuple[NetworkUse, ...]:
    """The networks to apply: `lora`, or the run's own result, and below them the run's base_weights.

    Raises NetworkFileError for a file that is no network.
    """
    chosen = table.lora or (str(own_result),)
    if tuple(Path(name).name for name in chosen) == (NO_NETWORK,):
        return ()
    strengths = table.lora_strength or (1.0,) * len(chosen)
    if len(strengths) != len(chosen):
        raise NetworkFileError(
            f"lora names {len(chosen)} files and lora_strength {len(strengths)} numbers: give one number for each file"
        )
    used = [
        _read(Path(name), strength, _OWN if not table.lora else "check the path given as lora")
        for name, strength in zip(chosen, strengths)
    ]
    below = zip(network.base_weights, network.base_weights_multiplier or (1.0,) * len(network.base_weights))
    merged = [
        replace(_read(path, by, "check the path given as base_weights"), guide=Guide())  # it is part of the base
        for path, by in below
        if path not in [use.path for use in used]
    ]
    return (*merged, *used)


def notes_on(networks: tuple[NetworkUse, ...]) -> list[str]:
    """What was merged into the base that a network was trained on, and is not applied now."""
    names = {use.path.name for use in networks}
    return [
        f"warning: {use.path.name} was trained on a base with {name} merged in, which is missing here: add it with"
        f" --base_weights (or --lora {name};{use.path.name})"
        for use in networks
        for name in use.guide.base_weights
        if Path(name).name not in names
    ]


def _read(path: Path, strength: float, advice: str) -> NetworkUse:
    if not path.is_file():
        raise NetworkFileError(f"there is no network file {path}: {advice}")
    header = read_header(path)
    if not header.tensors:
        raise NetworkFileError(f"{path} holds no tensors")
    return NetworkUse(path, strength, guide(header.metadata))


def agreed(networks: tuple[NetworkUse, ...], field: str, key: str) -> float | None:
    """What the networks say about `field` of their guides, or None. Raises NetworkFileError if they differ.

    `key` is the option that decides instead.
    """
    values = {network.path.name: getattr(network.guide, field) for network in networks}
    said = {value for value in values.values() if value is not None}
    if len(said) > 1:
        listed = ", ".join(f"{file}: {value:g}" for file, value in values.items() if value is not None)
        raise NetworkFileError(f"the networks were trained with different {key} ({listed}): choose with --{key}")
    return said.pop() if said else None
