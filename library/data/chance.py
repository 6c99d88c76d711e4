"""Draws made while planning: pure functions of their key, without torch.

What the trainer draws comes from library.flow.draws; these decide what is cached (crops, masks, tag orders).
"""

from __future__ import annotations

import hashlib
from random import Random


def chance(*key: str | int | float) -> Random:
    """A stream of draws that depends on ``key`` alone."""
    return Random(hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).digest())
