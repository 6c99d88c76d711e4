"""WHAT THE USER MAY SAY: every key declared once, TOML and command line read strictly. Imports no torch."""
