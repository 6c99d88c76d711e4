"""Choose precision, streaming, checkpointing and offload for a VRAM and a RAM budget, or say what would fit.

Keys that the user set stay as they are. The rest is chosen for quality first (bf16 if all of it stays on the card,
else int8, else nf4: weight errors of 0.1%, 0.85% and 9%), then for the fewest seconds per step, then for the fewest
devices in play. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.models import cost
from library.models.cost import GB, Card, Setting, Work
from library.models.shape import FluxShape

PRECISIONS = ("bf16", "int8", "nf4")
CHOSEN_KEYS = (
    "base_precision", "blocks_to_swap", "modulation_on_cpu", "gradient_checkpointing", "cpu_offload_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A setting, what it needs, and how long a step is estimated to take."""

    setting: Setting
    vram: float
    ram: float
    seconds: float

    def values(self, num_blocks: int) -> dict[str, object]:
        """The memory table's keys for this setting."""
        swapped = self.setting.blocks_to_swap
        return {
            "base_precision": self.setting.precision,
            "blocks_to_swap": "all" if swapped == num_blocks else swapped,
            "modulation_on_cpu": self.setting.modulation_on_cpu,
            "gradient_checkpointing": self.setting.checkpointing,
            "cpu_offload_checkpointing": self.setting.offload,
        }

    def toml(self, num_blocks: int) -> list[str]:
        """The choice as lines of a TOML file."""
        return ["[memory]", *(f"{key} = {toml_value(value)}" for key, value in self.values(num_blocks).items())]


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
    )


def price(shape: FluxShape, setting: Setting, work: Work, card: Card) -> Choice:
    """What a setting needs for training."""
    return Choice(
        setting,
        cost.training_vram(shape, setting, work).total,
        cost.training_ram(shape, setting, work).total,
        cost.step_seconds(shape, setting, work, card),
    )


def price_inference(shape: FluxShape, setting: Setting, work: Work, card: Card) -> Choice:
    """What a setting needs for predictions without gradients, where checkpointing and its offload play no part."""
    return Choice(
        setting,
        cost.inference_vram(shape, setting, work).total,
        cost.training_ram(shape, replace(setting, offload=False), work).total,
        cost.inference_seconds(shape, setting, work, card),
    )


Price = Callable[[FluxShape, Setting, Work, Card], Choice]


def choose(
    shape: FluxShape,
    memory: MemoryTable,
    work: Work,
    card: Card = cost.REFERENCE_CARD,
    default_precision: str = "bf16",
    priced: Price = price,
) -> Choice:
    """The best setting within `memory.vram_budget_gb` and `ram_budget_gb`.

    priced: what a setting costs, in training if not given. Raises ConfigError if nothing fits, naming the nearest
    setting that does.
    """
    assert memory.vram_budget_gb is not None
    vram = memory.vram_budget_gb * GB
    ram = memory.ram_budget_gb * GB if memory.ram_budget_gb is not None else float("inf")
    fixed = setting_of(memory, shape, default_precision)
    for precision in _precisions(memory, fixed):
        choices = [priced(shape, s, work, card) for s in _settings(shape, memory, replace(fixed, precision=precision))]
        fitting = [choice for choice in choices if choice.vram <= vram and choice.ram <= ram]
        if precision == "bf16" and "base_precision" not in memory.model_fields_set:
            fitting = [choice for choice in fitting if not choice.setting.blocks_to_swap]
        if fitting:
            return min(fitting, key=_preference)
    raise ConfigError(_nothing_fits(shape, memory, work, card, fixed, priced))


def _preference(choice: Choice) -> tuple:
    setting = choice.setting
    return round(choice.seconds, 2), setting.offload + setting.modulation_on_cpu, setting.blocks_to_swap, choice.vram


def _precisions(memory: MemoryTable, fixed: Setting) -> tuple[str, ...]:
    return (fixed.precision,) if "base_precision" in memory.model_fields_set else PRECISIONS


def _settings(shape: FluxShape, memory: MemoryTable, fixed: Setting) -> Iterator[Setting]:
    """Every combination of the keys that the user left open."""
    given = memory.model_fields_set
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


def _nothing_fits(shape: FluxShape, memory: MemoryTable, work: Work, card: Card, fixed: Setting, priced: Price) -> str:
    budgets = f"vram_budget_gb = {memory.vram_budget_gb:g}"
    if memory.ram_budget_gb is not None:
        budgets += f" and ram_budget_gb = {memory.ram_budget_gb:g}"
    everything = [
        priced(shape, setting, work, card)
        for precision in _precisions(memory, fixed)
        for setting in _settings(shape, memory, replace(fixed, precision=precision))
    ]
    ram = memory.ram_budget_gb * GB if memory.ram_budget_gb is not None else float("inf")
    nearest = min(everything, key=lambda choice: (max(0.0, choice.ram - ram), choice.vram))
    lines = ", ".join(nearest.toml(shape.double_blocks + shape.single_blocks)[1:])
    size = f"{work.width} x {work.height}, batch {work.batch}"
    smaller = _largest_size(
        nearest.setting, work, memory, lambda setting, work: priced(shape, setting, work, card).vram
    )
    return (
        f"{budgets}: nothing fits {size}. The nearest needs {nearest.vram / GB:.1f} GB of VRAM and"
        f" {nearest.ram / GB:.1f} GB of RAM ({lines}).{smaller}"
    )


def _largest_size(setting: Setting, work: Work, memory: MemoryTable, needed: Callable[[Setting, Work], float]) -> str:
    """A smaller batch or size that the nearest setting could do within the budget."""
    vram = (memory.vram_budget_gb or 0.0) * GB
    for batch in dict.fromkeys((work.batch, 1)):
        for side in (1024, 768, 512, 384, 256):
            smaller = replace(work, batch=batch, width=min(work.width, side), height=min(work.height, side))
            if needed(setting, smaller) <= vram:
                return f" With it, batches of {batch} at {smaller.width} x {smaller.height} would fit."
    return ""
