"""bitsandbytes, imported quietly.

On some CPUs it asks for the package `kernels` when it is imported, would fetch code from the hub with it, and prints a
line if it is not there. InFlux wants neither.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType


def bitsandbytes() -> ModuleType:
    """The module with its `functional` and `optim`."""
    if "bitsandbytes" not in sys.modules:
        _import_quietly()
    return importlib.import_module("bitsandbytes")


def _import_quietly() -> None:
    logger = logging.getLogger("bitsandbytes")
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # an import of it fails at once
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
