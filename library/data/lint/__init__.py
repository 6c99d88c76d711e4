"""WHAT SPOILS A TRAINING: pairs that are identical, shifted or doubled, masks that miss the change, captions cut off.

Nothing here is an error: the data can be cached and trained on. `influx_cache.py --lint` prints the findings, --preview
shows them beside the pictures. Works on the files with the plan's own geometry; imports no torch, loads no model.
"""

from library.data.lint.examine import Examined, examine
from library.data.lint.findings import KINDS, Finding
from library.data.lint.run import run

__all__ = ["KINDS", "Examined", "Finding", "examine", "run"]
