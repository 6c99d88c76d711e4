"""Random draws that are pure functions of their key.

Noise, timesteps, variants and dropouts are drawn from a generator seeded by (seed, purpose, micro-step, item, ...),
never from a running stream. So resuming, prefetching, workers and the number of processes cannot change a run.
Importing this imports no torch: plans that only draw single numbers do without.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Key = str | int


def key_seed(seed: int, *key: Key) -> int:
    """A 63-bit seed for (seed, *key), from SHA-256 of their unambiguous spelling."""
    spelled = repr((int(seed), *key)).encode("utf-8")
    return int.from_bytes(hashlib.sha256(spelled).digest()[:8], "little") >> 1


def generator(seed: int, *key: Key) -> torch.Generator:
    """A CPU generator that depends on (seed, *key) alone. Always on the CPU, so that every device draws the same."""
    import torch

    return torch.Generator("cpu").manual_seed(key_seed(seed, *key))


def normal(shape: tuple[int, ...], seed: int, *key: Key) -> Tensor:
    """Standard normal draws, float32, on the CPU."""
    import torch

    return torch.randn(shape, generator=generator(seed, *key))


def uniform(seed: int, *key: Key) -> float:
    """One uniform draw from [0, 1) in float64: the top 53 bits of the key's hash."""
    return (key_seed(seed, *key) >> 10) / (1 << 53)


def choice(count: int, seed: int, *key: Key) -> int:
    """One uniform draw from 0 .. count-1. Raises ValueError if there is nothing to choose from."""
    if count < 1:
        raise ValueError(f"cannot choose from {count} things")
    return int(uniform(seed, *key) * count)


def permutation(count: int, seed: int, *key: Key) -> list[int]:
    """A random order of 0 .. count-1."""
    import torch

    return torch.randperm(count, generator=generator(seed, *key)).tolist()
