"""The RAM of this machine, as far as a plan may count on it. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

GB = 1e9
MARGIN = 1.0 * GB
"""Free RAM that a plan leaves alone: the system's own needs change while a run lasts."""


@dataclass(frozen=True)
class Machine:
    """RAM in bytes: what is free now, and all there is. platform: as `sys.platform`."""

    free: float
    total: float
    platform: str = sys.platform

    @property
    def lockable(self) -> float:
        """Bytes that may be page-locked: Windows grants about half of the RAM, others what is free."""
        return self.total / 2 if self.platform == "win32" else float("inf")

    def shared_by(self, processes: int) -> Machine:
        """The part of each of several processes."""
        return replace(self, free=self.free / processes, total=self.total / processes)


UNLIMITED = Machine(float("inf"), float("inf"), "linux")
"""For plans that are made for no machine in particular."""


def this_machine(platform: str = sys.platform) -> Machine:
    """What this machine has now."""
    import psutil

    memory = psutil.virtual_memory()
    return Machine(float(memory.available), float(memory.total), platform)
