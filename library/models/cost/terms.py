"""The words of the memory model: how the base is kept (Setting), what is done with it (Work), bytes by use (Memory)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.models.encoders import FLUX_ENCODERS, Encoders

GB = 1e9
PIXELS_PER_TOKEN_SIDE = 16

CUDA_CONTEXT = 0.45 * GB
"""Driver context and cuBLAS workspaces: outside torch's allocator. 0.3 to 0.6 GB were reported."""
FRAGMENTATION = 1.05
"""What the allocator reserves beyond what is allocated."""
PROCESS_RAM = 2.5 * GB
"""Python, torch and its CUDA libraries."""

OPTIMIZER_BYTES = {
    "AdamW": 8, "AdamW8bit": 2.1, "PagedAdamW": 0, "PagedAdamW8bit": 0, "Lion": 4, "Lion8bit": 1.05,
    "PagedLion8bit": 0, "Adafactor": 4.1, "Prodigy": 16, "AdamWScheduleFree": 8, "RAdamScheduleFree": 8,
    "SGDScheduleFree": 4, "SGD": 4,
}  # fmt: skip
"""Bytes of optimizer state per trained parameter on the device (paged states live in RAM). Others: as AdamW."""
PAGED_BYTES = {"PagedAdamW": 8, "PagedAdamW8bit": 2.1, "PagedLion8bit": 1.05}
STEP_BYTES = {
    name: 0
    for name in (
        "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Lion", "Lion8bit", "PagedLion8bit", "Adafactor", "Prodigy",
    )
}  # fmt: skip
"""Bytes per trained parameter that exist only while the optimizer steps. These go parameter by parameter; the others
step all parameters at once and hold one list of intermediate values, 4 bytes."""


@dataclass(frozen=True)
class Setting:
    """How the base is kept and executed: the choices that memory depends on."""

    precision: str = "bf16"
    blocks_to_swap: int = 0
    ring: int = 2
    modulation_on_cpu: bool = False
    checkpointing: bool = True
    offload: bool = False
    keep: tuple[str, ...] = ()
    save_attention: bool = False
    pin: bool = True


@dataclass(frozen=True)
class Picture:
    """A picture that is painted: its size in pixels (the whole canvas), and how the VAE decodes it.

    vae_bytes: of one of the VAE's activations. steps: of denoising. A batch is denoised together, decoded one by one.
    decoded: False where only its noise is predicted (validation without pictures).
    """

    width: int
    height: int
    batch: int = 1
    vae_bytes: int = 4
    tiling: bool = False
    steps: int = 50
    decoded: bool = True


@dataclass(frozen=True)
class Work:
    """What is done with the base: one training step and the pictures made between steps; or, in inference, a picture.

    trained: parameters of the network. width, height: of the largest batch, in pixels. text: T5's tokens.
    weight_bytes: of a trained weight. micro_steps: batches whose gradients are added up. clip: parameters of CLIP,
    where it is trained too. preview, held_out: the largest pictures of previews and of validation. trains: False for
    inference, where `preview` is what is made and network_bytes the size of its networks. encoders: CLIP's and the
    VAE's sizes.
    """

    trained: int
    rank: int
    optimizer: str
    batch: int
    width: int
    height: int
    text: int
    activation_bytes: int = 2
    optimizer_offload: bool = False
    use_ema: bool = False
    ema_on_device: bool = False
    weight_bytes: int = 4
    micro_steps: int = 1
    processes: int = 1
    clip: int = 0
    preview: Picture | None = None
    held_out: Picture | None = None
    trains: bool = True
    network_bytes: float = 0.0
    encoders: Encoders = FLUX_ENCODERS

    @property
    def tokens(self) -> int:
        """Text and image tokens of one sample."""
        return tokens(self.width, self.height, self.text)


def tokens(width: int, height: int, text: int) -> int:
    """Text and image tokens of a picture of this size."""
    return text + (width // PIXELS_PER_TOKEN_SIDE) * (height // PIXELS_PER_TOKEN_SIDE)


@dataclass
class Memory:
    """Bytes by what they are for; `total` adds them up. locked: those of them that are page-locked RAM."""

    parts: dict[str, float] = field(default_factory=dict)
    locked: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def on_device(parts: Mapping[str, float]) -> Memory:
    """Device memory of these parts, with what the allocator and the driver add."""
    found = dict(parts)
    found["allocator"] = (FRAGMENTATION - 1) * sum(found.values())
    found["CUDA context"] = CUDA_CONTEXT
    return Memory(found)


def largest(phases: Mapping[str, Memory]) -> tuple[str, Memory]:
    """The phase that needs most. Phases follow each other and never overlap."""
    return max(phases.items(), key=lambda phase: phase[1].total)
