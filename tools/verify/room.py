"""How the base is kept while it is verified: the trainer's own choice, for what the card and the RAM have free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.forecast.choice import this_card
from library.models import budget, cost
from library.models.cost import GB, Encode, Memory, Picture, Work
from library.models.cost.terms import PROCESS_RAM
from library.models.machine import this_machine
from library.models.shape import FluxShape

SPARE = 0.95
"""Share of the free memory that is planned for."""
CHOSEN = ("base_precision", "blocks_to_swap", "modulation_on_cpu")
IRRELEVANT = {"gradient_checkpointing": False, "cpu_offload_checkpointing": False}
"""Keys of training: given, so that no choice is spent on them."""


@dataclass(frozen=True)
class Room:
    """What is used, and what it should need.

    dtype: of activations. device_bytes: what the device may use (on a CPU a part of the RAM); None for toys, which
    are neither planned nor forecast. work: one prediction.
    """

    device: torch.device
    dtype: torch.dtype
    memory: MemoryTable
    work: Work
    shape: FluxShape
    device_bytes: float | None

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the text encoders: bf16, as the caching command keeps T5; a toy's as its transformer."""
        return torch.bfloat16 if self.device_bytes is not None else self.dtype

    @property
    def precision(self) -> str:
        """Of the base's weights."""
        return self.memory.base_precision or plain(self.dtype)

    def fits(self, phase: Memory | None) -> bool:
        """Whether this much is there on the device."""
        return phase is None or self.device_bytes is None or phase.total <= self.device_bytes

    def caching(self, phase: str, layerwise: bool = False) -> Memory | None:
        """The forecast of 'text encoders' or 'VAE'; None for toys."""
        if self.device_bytes is None:
            return None
        work = self.work
        return cost.caching_phases(
            Encode(1, work.width * work.height, work.width, work.height, work.text, layerwise=layerwise)
        )[phase]

    def predicting(self) -> Memory | None:
        """The forecast of the transformer with what it computes; None for toys."""
        if self.device_bytes is None:
            return None
        setting = budget.setting_of(self.memory, self.shape, "bf16")
        return cost.largest(cost.inference_phases(self.shape, setting, self.work))[1]

    def lines(self) -> list[str]:
        """The memory settings as TOML lines, and what they should need."""
        given = {**{key: getattr(self.memory, key) for key in CHOSEN}, "base_precision": self.precision}
        said = [f"{key} = {budget.toml_value(value)}" for key, value in given.items()]
        needed = self.predicting()
        if needed is not None:
            where = "VRAM" if self.device.type == "cuda" else "RAM"
            said.append(f"# forecast: {needed.total / GB:.1f} GB of {where} ({self.device_bytes / GB:.1f} GB to use)")
        return said


def free_ram() -> float:
    """Bytes of RAM that can be had without swapping (what only caches files counts as free)."""
    return this_machine().free


def plain(dtype: torch.dtype) -> str:
    """'bf16' or 'fp32'."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def settle(shape: FluxShape, device: torch.device, given: dict, side: int, length: int) -> Room:
    """Choose how the transformer is kept. `given`: the memory keys that the user set, budgets among them.

    Toys stay whole, in fp32 on a CPU. Anything larger is planned as the trainer plans, with the cost of a prediction
    instead of a training step. Raises ConfigError if nothing fits, naming the nearest setting that does.
    """
    on_card = device.type == "cuda"
    is_toy = cost.is_toy(shape)
    native = not on_card or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if not native or (is_toy and not on_card) else torch.bfloat16
    picture = Picture(side, side)
    work = Work(0, 0, "", 1, side, side, length, activation_bytes=dtype.itemsize, preview=picture, trains=False)
    budgets = {key: given[key] for key in ("vram_budget_gb", "ram_budget_gb") if key in given}
    keys = {key: value for key, value in given.items() if key not in budgets}
    if is_toy:
        return Room(device, dtype, MemoryTable(**keys), work, shape, None)
    if on_card:
        vram = budgets.get("vram_budget_gb") or SPARE * torch.cuda.mem_get_info(device)[0] / GB
        ram = budgets.get("ram_budget_gb") or SPARE * free_ram() / GB
        table = MemoryTable(**IRRELEVANT, **keys, vram_budget_gb=vram, ram_budget_gb=ram)
    else:  # the weights live in RAM already: nothing to stream, and one budget
        vram = max(0.1, (budgets.get("ram_budget_gb") or SPARE * free_ram() / GB) - PROCESS_RAM / GB)
        keys = {"blocks_to_swap": 0, "modulation_on_cpu": False, **keys}
        table = MemoryTable(**IRRELEVANT, **keys, vram_budget_gb=vram)
    return Room(device, dtype, _chosen(shape, table, keys, work, on_card), work, shape, vram * GB)


def _chosen(shape: FluxShape, table: MemoryTable, keys: dict, work: Work, on_card: bool) -> MemoryTable:
    """The keys with what was left open chosen within the table's budgets."""
    card = (this_card().card if on_card else None) or cost.REFERENCE_CARD
    try:
        choice = budget.choose(shape, table, work, card)
    except ConfigError as error:
        if on_card:
            raise
        raise ConfigError(
            f"there is no GPU here, and the {table.vram_budget_gb:.1f} GB of RAM that are left for the transformer do"
            " not hold it. Free some, or say with --ram_budget_gb how much to use in all (11 holds nf4, 17 int8, 29"
            " bf16)"
        ) from error
    chosen = choice.values(shape.double_blocks + shape.single_blocks)
    return MemoryTable(**{**keys, **{key: chosen[key] for key in CHOSEN}})
