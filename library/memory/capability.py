"""What a device can do, as a value: so that a setting beyond it is refused by name before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from library.errors import ConfigError
from library.memory.attention import available_backends

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Activations for each mixed_precision."""


@dataclass(frozen=True)
class Capability:
    """One device.

    kind: 'cpu', 'cuda' or 'mps'. compute: an NVIDIA card's compute capability, else None. memory: bytes of a card.
    backends: which attention kernels work with activations of a dtype.
    """

    name: str
    kind: str
    compute: tuple[int, int] | None
    bf16: bool
    memory: int | None
    backends: Callable[[torch.dtype], list[str]]

    def below(self, compute: tuple[int, int]) -> bool:
        """Whether this is an NVIDIA card older than that."""
        return self.compute is not None and self.compute < compute

    def __str__(self) -> str:
        if self.compute is None:
            return self.name
        return f"{self.name} (compute capability {self.compute[0]}.{self.compute[1]})"


def capability_of(device: torch.device) -> Capability:
    """This machine's device."""
    backends = partial(available_backends, device)
    if device.type != "cuda":
        name = {"cpu": "the CPU", "mps": "Apple's GPU"}.get(device.type, device.type)
        return Capability(name, device.type, None, device.type == "cpu", None, backends)
    properties = torch.cuda.get_device_properties(device)
    compute = None if torch.version.hip else (properties.major, properties.minor)
    bf16 = compute is None or compute >= (8, 0)
    return Capability(properties.name, "cuda", compute, bf16, properties.total_memory, backends)


def mixed_precision(wanted: str | None, able: Capability) -> str:
    """`mixed_precision` as asked for, else bf16 on a card that has it and fp32 ('no') elsewhere.

    Raises ConfigError for bf16 on a card that would only emulate it.
    """
    if wanted is None:
        return "bf16" if able.kind == "cuda" and able.bf16 else "no"
    if wanted == "bf16" and able.kind == "cuda" and not able.bf16:
        raise ConfigError(
            f'mixed_precision = "bf16", but {able} has no bf16 arithmetic. Set mixed_precision = "no" and '
            'base_precision = "int8" or "nf4": it then computes in fp32 over the small stored weights, with '
            "activations twice as large (vram_budget_gb counts with that)."
        )
    return wanted
