"""Every key by every name it may be written with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pydantic.fields import FieldInfo

from library.config import tables
from library.config.foreign import FOREIGN
from library.config.rewrites import REWRITES
from library.config.table import Command, KeyInfo, Table
from library.config.values import closest

# In the order in which help and reference show them. The name is the attribute of Run; data sets are apart.
TABLES: dict[str, type[Table]] = {
    "command": tables.CommandTable,
    "model": tables.ModelTable,
    "cache": tables.CacheTable,
    "network": tables.NetworkTable,
    "optimizer": tables.OptimizerTable,
    "training": tables.TrainingTable,
    "memory": tables.MemoryTable,
    "sampling": tables.SamplingTable,
    "validation": tables.ValidationTable,
    "saving": tables.SavingTable,
    "logging": tables.LoggingTable,
    "inference": tables.InferenceTable,
}
DATA_TABLES: dict[str, type[Table]] = {"dataset": tables.DatasetTable, "subset": tables.SubsetTable}
ALL_TABLES: dict[str, type[Table]] = {
    "command": tables.CommandTable,
    "model": tables.ModelTable,
    **DATA_TABLES,
    **{name: table for name, table in TABLES.items() if name not in ("command", "model")},
}
SECTIONS = ("dataset", "general", *(name for name in TABLES if name != "command"))


@dataclass(frozen=True)
class Declared:
    """One key: the table it is declared in, its name, and its declaration."""

    table: str
    name: str
    field: FieldInfo
    info: KeyInfo

    @property
    def readers(self) -> frozenset[str]:
        """The commands that read it."""
        return ALL_TABLES[self.table].readers(self.info)

    @property
    def sections(self) -> tuple[str, ...]:
        """The TOML tables it may stand in."""
        if self.info.section is not None:
            return (self.info.section,)
        return ("dataset", "general") if self.table in DATA_TABLES else (self.table,)


@cache
def declared() -> dict[str, Declared]:
    """Canonical name -> declaration, of every key."""
    found: dict[str, Declared] = {}
    for table_name, table in ALL_TABLES.items():
        for name, field, info in table.entries():
            assert name not in found, f"{name} is declared in {found[name].table} and {table_name}"
            found[name] = Declared(table_name, name, field, info)
    return found


@cache
def aliases() -> dict[str, str]:
    """Alias -> canonical name."""
    found: dict[str, str] = {}
    for name, key in declared().items():
        for alias in key.info.aliases:
            assert alias not in found and alias not in declared(), f"alias {alias} is taken"
            found[alias] = name
    return found


@cache
def _short() -> dict[tuple[str, str], str]:
    return {(key.table, key.info.short): name for name, key in declared().items() if key.info.short}


def canonical(name: str, section: str | None, command: Command, command_line: bool) -> str | None:
    """The canonical name of what was written, or None. Short names count in their own table and command only."""
    scope = section if section is not None else ("inference" if command_line and command == "infer" else "")
    if (scope, name) in _short():
        return _short()[scope, name]
    name = aliases().get(name, name)
    return name if name in declared() else None


def unknown(name: str) -> str:
    """The message for a key that does not exist."""
    if name in FOREIGN:
        return f"{name} is no key of InFlux: {FOREIGN[name]}"
    words = [*declared(), *aliases(), *REWRITES]
    return f"there is no key {name}.{closest(name, words)}"
