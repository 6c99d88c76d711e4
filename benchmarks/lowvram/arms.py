"""What is measured: every precision with every way to keep the base, our extras, and diffusers + PEFT beside them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from library.config.tables import MemoryTable
from library.models import budget
from library.models.cost import Setting
from library.models.shape import FluxShape

RANK = 16
LEARNING_RATE = 1e-4
OPTIMIZER = "AdamW8bit"
TOY = FluxShape(
    hidden=64, heads=2, mlp=256, double_blocks=2, single_blocks=4, text_width=64, pooled_width=32, axes_dim=(8, 12, 12)
)
HALF = "half"
"""`blocks_to_swap` of an arm that streams every other block, at any depth."""

PRECISIONS = ("int8", "nf4", "bf16", "fp8")
_STREAMED = {"modulation_on_cpu": True, "blocks_to_swap": "all"}
WAYS: dict[str, dict[str, object]] = {
    "resident": {},
    "modulation in RAM": {"modulation_on_cpu": True},
    "half streamed": {"modulation_on_cpu": True, "blocks_to_swap": HALF},
    "streamed": _STREAMED,
    "streamed, checkpoints in RAM": {**_STREAMED, "cpu_offload_checkpointing": True},
}
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    memory: keys of the [memory] table; for a peer (diffusers + PEFT), of the setting it is compared with.
    peer: "" for InFlux, else which weights diffusers holds ("bf16" or "nf4").
    """

    name: str
    memory: dict[str, object] = field(default_factory=dict)
    peer: str = ""
    compiled: bool = False

    def table(self, shape: FluxShape, toy: bool) -> MemoryTable:
        """The [memory] table of this arm for a model of this shape."""
        values = {"gradient_checkpointing": True, "memory_probe": False, **self.memory}
        if values.get("blocks_to_swap") == HALF:
            values["blocks_to_swap"] = (shape.double_blocks + shape.single_blocks) // 2
        if self.compiled and not self.peer:
            values |= {"torch_compile": True, "dynamo_backend": backend(toy)}
        return MemoryTable(**values)

    def setting(self, shape: FluxShape) -> Setting:
        """The same, as the memory model knows it."""
        return budget.setting_of(self.table(shape, False), shape, "bf16")

    def missing(self, device: str, capability: tuple[int, int]) -> str | None:
        """Why this arm cannot run here; None if it can."""
        needed = ["bitsandbytes", *(["peft", "diffusers"] if self.peer else [])]
        absent = [name for name in needed if importlib.util.find_spec(name) is None]
        if absent:
            return f"needs {' and '.join(absent)}"
        if self.memory.get("fp8_arithmetic") and device == "cuda" and capability < FP8_CAPABILITY:
            return f"fp8 arithmetic needs compute capability 8.9, this card has {capability[0]}.{capability[1]}"
        return None


def backend(toy: bool) -> str:
    """What compiles: at toy size nothing does, the graphs are only traced."""
    return "eager" if toy else "inductor"


def _all_arms() -> dict[str, Arm]:
    arms = [
        Arm(f"{precision} {way}", {"base_precision": precision, **keys})
        for way, keys in WAYS.items()
        for precision in PRECISIONS
    ]
    arms += [
        Arm("bf16 resident, compiled", {"base_precision": "bf16"}, compiled=True),
        Arm("int8 resident, compiled", {"base_precision": "int8"}, compiled=True),
        Arm("int8 streamed, pageable", {"base_precision": "int8", **_STREAMED, "pin_memory": False}),
        Arm("int8 resident, int8 arithmetic", {"base_precision": "int8", "int8_arithmetic": True}),
        Arm("fp8 resident, fp8 arithmetic", {"base_precision": "fp8", "fp8_arithmetic": True}),
        Arm("diffusers+peft bf16", {"base_precision": "bf16"}, peer="bf16"),
        Arm("diffusers+peft bf16, compiled", {"base_precision": "bf16"}, peer="bf16", compiled=True),
        Arm("diffusers+peft nf4", {"base_precision": "nf4"}, peer="nf4"),
    ]
    return {arm.name: arm for arm in arms}


_FIRST = (
    "int8 streamed, checkpoints in RAM",
    "nf4 modulation in RAM",
    "bf16 resident",
    "bf16 resident, compiled",
    "diffusers+peft bf16, compiled",
    "int8 resident",
    "int8 streamed",
    "diffusers+peft bf16",
    "int8 half streamed",
    "nf4 resident",
    "nf4 streamed, checkpoints in RAM",
    "diffusers+peft nf4",
    "fp8 resident",
    "int8 streamed, pageable",
    "int8 resident, compiled",
    "int8 resident, int8 arithmetic",
    "fp8 resident, fp8 arithmetic",
    "nf4 streamed",
    "bf16 streamed",
    "fp8 streamed",
)
_ALL = _all_arms()
ARMS: dict[str, Arm] = {name: _ALL[name] for name in (*_FIRST, *(name for name in _ALL if name not in _FIRST))}
"""Every arm by name, those that decide a target first."""
