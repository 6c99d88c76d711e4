"""How torch's own allocators are set up: page-locked memory as large as it was asked for, and segments that can grow.

torch rounds page-locked allocations up to a power of two unless told otherwise: streaming would need about 18% more RAM
than the memory model says. It reads its settings once, so they are made before it is imported where that is possible.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import MutableMapping

VARIABLE = "PYTORCH_ALLOC_CONF"
USERS_OWN = (VARIABLE, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
KNOWN_SINCE = (2, 13)
"""The torch that these settings were checked with; older ones on CUDA refuse to start over a name they do not know."""


def settings(platform: str = sys.platform) -> str:
    """What is put into PYTORCH_ALLOC_CONF. Windows has no growing segments, and warns about the wish."""
    exact = "pinned_max_round_threshold_mb:1"
    return f"{exact},expandable_segments:True" if platform.startswith("linux") else exact


def configure(environment: MutableMapping[str, str] = os.environ, version: str | None = None) -> bool:
    """Set up torch's allocators, unless the user has; call it before anything is allocated. Returns whether it did.

    version: torch's, the installed one's if not given.
    """
    if any(name in environment for name in USERS_OWN):
        return False
    if _numbers(version or _installed()) < KNOWN_SINCE:
        return False
    environment[VARIABLE] = settings()
    if "torch" in sys.modules:
        sys.modules["torch"]._C._accelerator_setAllocatorSettings(environment[VARIABLE])
    return True


def _installed() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # a torch built in place, or none: its import will say so
        return "0.0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
