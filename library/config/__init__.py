"""WHAT THE USER MAY SAY: every key declared once, TOML and command line read strictly. Imports no torch."""

from library.config.load import load
from library.config.run import Run
from library.config.show import help_text
from library.config.table import COMMANDS, Command, Table, key

__all__ = ["COMMANDS", "Command", "Run", "Table", "help_text", "key", "load"]
