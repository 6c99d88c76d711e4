"""Choose precision, streaming, checkpointing and offload for a VRAM and a RAM budget, or say what would fit.

Keys that the user set stay as they are. The rest is chosen for quality first (bf16 if all of it stays on the card,
else int8, else nf4: weight errors of 0.1%, 0.85% and 9%), then for the fewest seconds per step, then for the fewest
devices in play. Every phase of the command has to fit: the step, and the pictures between steps. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.models import cost
from library.models.cost import GB, Card, Memory, Setting, Work
from library.models.machine import MARGIN, UNLIMITED, Machine
from library.models.shape import FluxShape

PRECISIONS = ("bf16", "int8", "nf4")
STEP_PHASES = ("training step", "optimizer step")
SIZE_KEYS = {"preview": "--w and --h, or validation_width and validation_height", "held_out": "resolution"}
PATIENCE = 2.0
"""What can be locked decides between int8 from pageable RAM and nf4 from locked RAM: nf4 if int8 takes this many times
as long."""


@dataclass(frozen=True)
class Choice:
    """A setting, what it needs (GPU and RAM at the largest phase, and locked RAM), and how long a step may take."""

    setting: Setting
    vram: float
    ram: float
    seconds: float
    phase: str = "training step"
    locked: float = 0.0
    trains: bool = True

    def values(self, num_blocks: int) -> dict[str, object]:
        """The memory table's keys for this setting."""
        swapped = self.setting.blocks_to_swap
        found: dict[str, object] = {
            "base_precision": self.setting.precision,
            "blocks_to_swap": "all" if swapped == num_blocks else swapped,
            "modulation_on_cpu": self.setting.modulation_on_cpu,
        }
        if self.trains:
            found["gradient_checkpointing"] = self.setting.checkpointing
            found["cpu_offload_checkpointing"] = self.setting.offload
        return found if self.setting.pin else {**found, "pin_memory": False}

    def toml(self, num_blocks: int) -> list[str]:
        """The choice as lines of a TOML file."""
        return ["[memory]", *(f"{key} = {toml_value(value)}" for key, value in self.values(num_blocks).items())]


@dataclass(frozen=True)
class Limits:
    """Bytes that a choice may use. lockable: of the RAM, page-locked."""

    vram: float
    ram: float
    lockable: float

    def holds(self, choice: Choice) -> bool:
        """Whether the choice keeps to all of them."""
        return choice.vram <= self.vram and choice.ram <= self.ram and choice.locked <= self.lockable


def limits_of(memory: MemoryTable, machine: Machine) -> Limits:
    """The budgets of a memory table; where it says nothing about RAM, what this machine has free, less a margin."""
    assert memory.vram_budget_gb is not None
    ram = machine.free - MARGIN if memory.ram_budget_gb is None else memory.ram_budget_gb * GB
    return Limits(memory.vram_budget_gb * GB, ram, machine.lockable)


def budget_words(memory: MemoryTable, machine: Machine) -> str:
    """The budgets, as the user reads them."""
    words = f"vram_budget_gb = {memory.vram_budget_gb:g}"
    if memory.ram_budget_gb is not None:
        return f"{words} and ram_budget_gb = {memory.ram_budget_gb:g}"
    if machine.free == float("inf"):
        return words
    return f"{words} (ram_budget_gb not set: {machine.free / GB:.1f} GB free, {MARGIN / GB:.0f} GB of it left alone)"


def toml_value(value: object) -> str:
    """A boolean, a number or a plain word as TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def setting_of(memory: MemoryTable, shape: FluxShape, default_precision: str) -> Setting:
    """The setting that a memory table describes."""
    num_blocks = shape.double_blocks + shape.single_blocks
    return Setting(
        precision=memory.base_precision or default_precision,
        blocks_to_swap=num_blocks if memory.blocks_to_swap == "all" else min(memory.blocks_to_swap, num_blocks),
        ring=memory.swap_ring_size,
        modulation_on_cpu=memory.modulation_on_cpu,
        checkpointing=memory.gradient_checkpointing or memory.cpu_offload_checkpointing,
        offload=memory.cpu_offload_checkpointing,
        keep=tuple(memory.keep_precision_patterns),
        save_attention=memory.save_attention_outputs,
        pin=memory.pin_memory,
    )


def phases_of(shape: FluxShape, setting: Setting, work: Work) -> dict[str, Memory]:
    """Device memory of the phases whose size the setting decides."""
    if work.trains:
        return cost.training_phases(shape, setting, work)
    return cost.inference_phases(shape, setting, work)


def price(shape: FluxShape, setting: Setting, work: Work, card: Card) -> Choice:
    """What a setting needs for this work."""
    phase, vram = cost.largest(phases_of(shape, setting, work))
    if work.trains:
        ram, seconds = cost.training_ram(shape, setting, work), cost.step_seconds(shape, setting, work, card)
    else:
        assert work.preview is not None
        _, ram = cost.largest(cost.inference_ram(shape, setting, work))
        seconds = cost.painting_seconds(shape, setting, work.preview, work.text, card)
    return Choice(setting, vram.total, ram.total, seconds, phase, ram.locked, work.trains)


def choose(
    shape: FluxShape,
    memory: MemoryTable,
    work: Work,
    card: Card = cost.REFERENCE_CARD,
    default_precision: str = "bf16",
    machine: Machine = UNLIMITED,
) -> Choice:
    """The best setting within `memory.vram_budget_gb` and `ram_budget_gb`, or what `machine` has free.

    Raises ConfigError if nothing fits, naming the nearest setting that does.
    """
    limits = limits_of(memory, machine)
    fixed = setting_of(memory, shape, default_precision)
    pageable: Choice | None = None
    for precision in _precisions(memory, fixed):
        fitting = _fitting(shape, memory, work, card, replace(fixed, precision=precision), limits)
        if precision == "bf16" and "base_precision" not in memory.model_fields_set:
            fitting = [choice for choice in fitting if not choice.setting.blocks_to_swap]
        if not fitting:
            continue
        best = min(fitting, key=_preference)
        if pageable is not None:
            return best if pageable.seconds > PATIENCE * best.seconds else pageable
        if best.setting.pin or not best.setting.blocks_to_swap or "pin_memory" in memory.model_fields_set:
            return best
        pageable = best
    if pageable is not None:
        return pageable
    raise ConfigError(_nothing_fits(shape, memory, work, card, fixed, machine))


def _fitting(
    shape: FluxShape, memory: MemoryTable, work: Work, card: Card, fixed: Setting, limits: Limits
) -> list[Choice]:
    """The settings that keep to the limits; from pageable RAM only if none does from locked RAM."""
    for pin in (fixed.pin,) if "pin_memory" in memory.model_fields_set else (True, False):
        settings = _settings(shape, memory, replace(fixed, pin=pin), work.trains)
        found = [choice for choice in (price(shape, one, work, card) for one in settings) if limits.holds(choice)]
        if found or limits.lockable == float("inf"):
            return found
    return []


def _preference(choice: Choice) -> tuple:
    setting = choice.setting
    return round(choice.seconds, 2), setting.offload + setting.modulation_on_cpu, setting.blocks_to_swap, choice.vram


def _precisions(memory: MemoryTable, fixed: Setting) -> tuple[str, ...]:
    return (fixed.precision,) if "base_precision" in memory.model_fields_set else PRECISIONS


def _settings(shape: FluxShape, memory: MemoryTable, fixed: Setting, trains: bool) -> Iterator[Setting]:
    """Every combination of the keys that the user left open."""
    given = memory.model_fields_set if trains else {
        *memory.model_fields_set, "cpu_offload_checkpointing", "gradient_checkpointing",
    }  # fmt: skip
    num_blocks = shape.double_blocks + shape.single_blocks
    either = lambda key, value: (value,) if key in given else (False, True)
    counts = (fixed.blocks_to_swap,) if "blocks_to_swap" in given else range(num_blocks + 1)
    for modulation in either("modulation_on_cpu", fixed.modulation_on_cpu):
        for offload in either("cpu_offload_checkpointing", fixed.offload):
            for checkpointing in either("gradient_checkpointing", fixed.checkpointing):
                if offload and not checkpointing:
                    continue
                for count in counts:
                    yield replace(
                        fixed, modulation_on_cpu=modulation, offload=offload, checkpointing=checkpointing,
                        blocks_to_swap=count,
                    )  # fmt: skip


def _nothing_fits(
    shape: FluxShape, memory: MemoryTable, work: Work, card: Card, fixed: Setting, machine: Machine
) -> str:
    limits = limits_of(memory, machine)
    everything = [
        price(shape, setting, work, card)
        for precision in _precisions(memory, fixed)
        for setting in _settings(shape, memory, replace(fixed, precision=precision), work.trains)
    ]
    nearest = min(everything, key=lambda choice: (max(0.0, choice.ram - limits.ram), choice.vram))
    lines = ", ".join(nearest.toml(shape.double_blocks + shape.single_blocks)[1:])
    size = f"{work.width} x {work.height}, batch {work.batch}"
    advice = _about_pictures(shape, nearest, work, limits) or _largest_size(shape, nearest.setting, work, limits)
    return (
        f"{budget_words(memory, machine)}: nothing fits {size}. The nearest needs {nearest.vram / GB:.1f} GB of VRAM"
        f" ({nearest.phase}) and {nearest.ram / GB:.1f} GB of RAM ({lines}).{advice}"
    )


def _about_pictures(shape: FluxShape, nearest: Choice, work: Work, limits: Limits) -> str:
    """Advice where a picture, and not the step, is what breaks the budget; '' otherwise."""
    which = "held_out" if nearest.phase.startswith("validation") else "preview"
    picture = getattr(work, which)
    if nearest.vram <= limits.vram or picture is None or nearest.phase in STEP_PHASES:
        return ""

    def fits(**changed: object) -> bool:
        smaller = replace(work, **{which: replace(picture, **changed)})
        return cost.largest(phases_of(shape, nearest.setting, smaller))[1].total <= limits.vram

    found = ["vae_tiling = true"] if not picture.tiling and fits(tiling=True) else []
    for side in (1024, 768, 512, 384, 256):
        width, height = min(picture.width, side), min(picture.height, side)
        if (width, height) != (picture.width, picture.height) and fits(width=width, height=height):
            keys = SIZE_KEYS[which] if work.trains else "inference_resolution"
            found.append(f"pictures of at most {side} x {side} ({keys})")
            break
    return f" What breaks the budget is the phase {nearest.phase}: {' or '.join(found)} would fit." if found else ""


def _largest_size(shape: FluxShape, setting: Setting, work: Work, limits: Limits) -> str:
    """A smaller batch or size that the nearest setting could train within the budget."""
    if not work.trains:
        return ""
    for batch in dict.fromkeys((work.batch, 1)):
        for side in (1024, 768, 512, 384, 256):
            smaller = replace(work, batch=batch, width=min(work.width, side), height=min(work.height, side))
            if cost.training_vram(shape, setting, smaller).total <= limits.vram:
                return f" With it, batches of {batch} at {smaller.width} x {smaller.height} would fit."
    return ""
