"""WHAT THE USER MAY SAY: every key declared once, TOML and command line read strictly. Imports no torch."""

from library.config.load import load
from library.config.resolved import changed, differences, identity, identity_hash, metadata_toml, resolved_toml
from library.config.run import Run
from library.config.show import help_text
from library.config.table import COMMANDS, Command, Table, key

__all__ = [
    "COMMANDS",
    "Command",
    "Run",
    "Table",
    "changed",
    "differences",
    "help_text",
    "identity",
    "identity_hash",
    "key",
    "load",
    "metadata_toml",
    "resolved_toml",
]
