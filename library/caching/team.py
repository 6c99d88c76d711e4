"""The processes that share one caching run, started by `torchrun` or `accelerate launch`, or one alone.

The first leads: it looks at the data, holds the cache's lock and writes the manifest. All encode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Work = TypeVar("Work")


@dataclass(frozen=True)
class Team:
    """This process among all of them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Team:
        """Find out from the launcher's variables; connects to the others if there are any."""
        team = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if team.size > 1:
            from datetime import timedelta

            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(hours=24))
        return team

    @property
    def leads(self) -> bool:
        """Whether this process plans, talks and promises."""
        return self.rank == 0

    def share(self, work: Sequence[Work]) -> list[Work]:
        """This process's part: every size-th piece, so that each gets some of every picture size."""
        return list(work[self.rank :: self.size])

    def meet(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What the others do while the first holds the lock."""
        yield
