"""What the chosen network files say about how they want to be used, read from their headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.tables import InferenceTable
from library.errors import NetworkFileError
from library.networks.metadata import Guide, guide
from library.tensorfile import read_header

NO_NETWORK = "none"


@dataclass(frozen=True)
class NetworkUse:
    """One network file, how strongly it is applied, and what it says about itself."""

    path: Path
    strength: float
    guide: Guide


def networks_of(table: InferenceTable, own_result: Path) -> tuple[NetworkUse, ...]:
    """The networks to apply: `lora`, or the run's own result. Raises NetworkFileError for a file that is no network."""
    chosen = table.lora or (str(own_result),)
    if tuple(Path(name).name for name in chosen) == (NO_NETWORK,):
        return ()
    strengths = table.lora_strength or (1.0,) * len(chosen)
    if len(strengths) != len(chosen):
        raise NetworkFileError(
            f"lora names {len(chosen)} files and lora_strength {len(strengths)} numbers: give one number for each file"
        )
    return tuple(_read(Path(name), strength, not table.lora) for name, strength in zip(chosen, strengths))


def _read(path: Path, strength: float, is_own: bool) -> NetworkUse:
    if not path.is_file():
        advice = (
            "train first (influx_train.py), name a file with --lora, or use the base alone with --lora none"
            if is_own
            else "check the path given as lora"
        )
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
