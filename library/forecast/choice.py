"""Settings for a budget: what `vram_budget_gb` and `ram_budget_gb` leave InFlux to choose."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from library.config.run import Run
from library.forecast.work import PRECISION_NAMES, work_of
from library.models import budget, cost
from library.models.cost import GB, Card, Setting, Work
from library.models.cost.encoding import WHOLE_T5_BYTES
from library.models.machine import Machine, this_machine
from library.models.shape import FluxShape


@dataclass(frozen=True)
class Device:
    """This machine's first GPU: its figures, if the card is known, and its memory in bytes."""

    card: Card | None = None
    memory: float | None = None


def this_card() -> Device:
    """What the driver's tool says, if it is there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Device()
    asked = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode or not answer.stdout:
        return Device()
    name, _, megabytes = answer.stdout.splitlines()[0].rpartition(",")
    known = megabytes.strip().isdigit()
    return Device(cost.card_named(name), float(megabytes) * (1 << 20) if known else None)


def default_precision(run: Run) -> str:
    """The base's precision where base_precision is not set."""
    return PRECISION_NAMES[run.training.mixed_precision or "bf16"]


def setting_of(run: Run, shape: FluxShape) -> Setting:
    """How this run keeps the base."""
    return budget.setting_of(run.memory, shape, default_precision(run))


def settle(
    run: Run, shape: FluxShape, card: Card | None = None, machine: Machine | None = None, work: Work | None = None
) -> tuple[Run, list[str]]:
    """The run with the memory settings chosen for its budget, and the lines that say so; unchanged without a budget.

    work: what has to fit; the training's heaviest moments if not given. Raises ConfigError if nothing fits.
    """
    if run.memory.vram_budget_gb is None:
        return run, []
    machine = machine or this_machine()
    num_blocks = shape.double_blocks + shape.single_blocks
    work = work or work_of(run, shape)
    machine = machine.shared_by(work.processes)
    card = card or this_card().card or cost.REFERENCE_CARD
    choice = budget.choose(shape, run.memory, work, card, machine=machine)
    words = budget.budget_words(run.memory, machine)
    lines = [f"chosen for {words}:", *choice.toml(num_blocks)]
    if choice.phase.endswith("decoding") and not run.cache.vae_tiling:
        lines.append(f"# {choice.phase} needs most: vae_tiling = true, or smaller pictures, leave the base more room")
    return run.with_values("memory", "vram_budget_gb", **choice.values(num_blocks)), lines


def settle_painting(
    run: Run, shape: FluxShape, work: Work, card: Card | None = None, machine: Machine | None = None
) -> tuple[Run, list[str]]:
    """The same for a command that paints (`work` of painting_of) and encodes prompts before it does."""
    settled, lines = settle(run, shape, card, machine, work)
    settled, more = settle_encoders(settled)
    return settled, [*lines, *more]


def settle_encoders(run: Run) -> tuple[Run, list[str]]:
    """T5 layer by layer where the budget does not hold it whole."""
    wanted = run.memory.vram_budget_gb
    if wanted is None or run.cache.t5xxl_layer_by_layer is not None or wanted * GB >= WHOLE_T5_BYTES:
        return run, []
    lines = ["[cache]", "t5xxl_layer_by_layer = true"]
    return run.with_values("cache", "vram_budget_gb", t5xxl_layer_by_layer=True), lines


def layerwise(run: Run, device: Device) -> bool:
    """Whether T5 will visit the device layer by layer, as far as this can be known before the device is opened."""
    if run.cache.t5xxl_layer_by_layer is not None:
        return run.cache.t5xxl_layer_by_layer
    return device.memory is not None and device.memory < WHOLE_T5_BYTES
