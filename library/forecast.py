"""What a run will need and take, said before it starts; and the memory settings chosen for a VRAM budget.

`--dry_run` prints the lines, `vram_budget_gb` uses the choice. Works from the configuration and the checkpoint's
header alone: no torch, no weights. Every time is an estimate from the card's peak figures, and says so.
"""

from __future__ import annotations

import shutil
import subprocess

from library.conditioning import MODES
from library.config.run import Run
from library.config.tables.cache import CacheTable
from library.config.tables.dataset import DatasetTable
from library.data.buckets import Bucketing
from library.models import budget, cost
from library.models.budget import Choice
from library.models.cost import GB, Card, Memory, Work
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape
from library.networks import plan

ACTIVATION_BYTES = {"no": 4, "fp16": 2, "bf16": 2}
PRECISION_NAMES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
DEFAULT_LENGTH = 512
REFERENCE_FULL_MODEL = 1_000_000_000
"""Parameters from which a base is no toy: smaller ones are trained on a CPU, where this forecast means nothing."""


def find_card() -> Card | None:
    """This machine's first GPU, if the driver's tool is there and the card is known."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return cost.card_named(answer.stdout.splitlines()[0]) if answer.returncode == 0 and answer.stdout else None


def free_ram() -> int:
    """Bytes of RAM that can be had without swapping (what only caches files counts as free)."""
    import psutil  # accelerate needs it, so it is there

    return psutil.virtual_memory().available


def largest_bucket(datasets: tuple[DatasetTable, ...]) -> tuple[int, int, int]:
    """(width, height, batch) of the batch with the most pixels that these data sets can give."""
    found = []
    for dataset in datasets:
        sizes = [
            size
            for resolution in dataset.sizes
            for size in Bucketing(
                resolution, dataset.enable_bucket, dataset.min_bucket_reso, dataset.max_bucket_reso,
                dataset.bucket_reso_steps, dataset.bucket_no_upscale,
            ).sizes()
        ]  # fmt: skip
        modes = {subset.mode for subset in dataset.subsets} or {"edit"}
        found += [(*MODES[mode].canvas(*size), dataset.train_batch_size) for mode in modes for size in sizes]
    return max(found, key=lambda bucket: bucket[0] * bucket[1] * bucket[2], default=(512, 512, 1))


def work_of(run: Run, shape: FluxShape) -> Work:
    """The heaviest step of this configuration."""
    settled = plan(run.network, linear_shapes(shape))
    trained = sum(t.rank * (t.in_features * len(t.groups) + t.trained_rows) for t in settled.targets)
    rank = max((target.rank for target in settled.targets), default=0)
    width, height, batch = largest_bucket(run.datasets)
    return Work(
        trained=trained + (shape.in_channels * shape.hidden if settled.x_embedder else 0),
        rank=rank,
        optimizer=run.optimizer.optimizer_type,
        batch=batch,
        width=width,
        height=height,
        text=run.cache.t5xxl_max_token_length or DEFAULT_LENGTH,
        activation_bytes=ACTIVATION_BYTES[run.training.mixed_precision or "bf16"],
        optimizer_offload=run.memory.optimizer_offload,
        use_ema=run.training.use_ema,
    )


def settle(run: Run, shape: FluxShape, card: Card | None = None) -> tuple[Run, list[str]]:
    """The run with the memory settings chosen for its budget, and the lines that say so; unchanged without a budget.

    Raises ConfigError if nothing fits.
    """
    if run.memory.vram_budget_gb is None:
        return run, []
    num_blocks = shape.double_blocks + shape.single_blocks
    choice = budget.choose(shape, run.memory, work_of(run, shape), card or find_card() or cost.REFERENCE_CARD)
    lines = [f"chosen for vram_budget_gb = {run.memory.vram_budget_gb:g}:", *choice.toml(num_blocks)]
    return run.with_values("memory", "vram_budget_gb", **choice.values(num_blocks)), lines


def training_lines(run: Run, shape: FluxShape, card: Card | None = None) -> list[str]:
    """What the training command will need, and about how long it will take."""
    run, lines = settle(run, shape, card)
    card = card or find_card()
    work = work_of(run, shape)
    setting = budget.setting_of(run.memory, shape, PRECISION_NAMES[run.training.mixed_precision or "bf16"])
    vram, ram = cost.training_vram(shape, setting, work), cost.training_ram(shape, setting, work)
    lines.append(
        f"largest batch: {work.batch} x {work.width} x {work.height} pixels, {work.text} text tokens;"
        f" {work.trained / 1e6:.1f} M trained parameters"
    )
    lines += [*_memory_lines("VRAM", vram), *_memory_lines("RAM", ram)]
    state = (4 + cost.OPTIMIZER_BYTES.get(work.optimizer, 8) + cost.PAGED_BYTES.get(work.optimizer, 0)) * work.trained
    lines.append(f"disk: {4 * work.trained / GB:.2f} GB per saved network, {state / GB:.2f} GB per state")
    choice = Choice(
        setting, vram.total, ram.total, cost.step_seconds(shape, setting, work, card or cost.REFERENCE_CARD)
    )
    return [*lines, _time_line(run, shape, choice, card)]


def _memory_lines(what: str, memory: Memory) -> list[str]:
    parts = [f"  {bytes_ / GB:6.2f}  {name}" for name, bytes_ in memory.parts.items() if bytes_ >= 0.005 * GB]
    return [f"{what}: {memory.total / GB:.2f} GB", *parts]


def _time_line(run: Run, shape: FluxShape, choice: Choice, card: Card | None) -> str:
    if num_parameters(shape) < REFERENCE_FULL_MODEL:
        return "time: not estimated (the base is a toy)"
    name = card.name if card else f"{cost.REFERENCE_CARD.name} (no known card found here)"
    steps = run.training.max_train_steps
    micro = run.training.gradient_accumulation_steps
    seconds = choice.seconds * micro
    hours = f", {seconds * steps / 3600:.1f} hours for {steps} steps" if steps else ""
    return f"time: about {seconds:.1f} s per step{hours} on {name}. An estimate from peak figures, not a measurement."


def num_parameters(shape: FluxShape) -> int:
    """Weights of the transformer's linears: 11.9e9 for FLUX.1 Fill."""
    return sum(out * width for out, width in linear_shapes(shape).values())


def caching_lines(datasets: tuple[DatasetTable, ...], table: CacheTable, layerwise: bool) -> list[str]:
    """What the caching command's phases will need on the device, for FLUX.1's own text encoders and VAE."""
    width, height, _ = largest_bucket(datasets)
    phases = cost.caching_vram(width, height, table.vae_batch_size, layerwise)
    return [f"VRAM, {phase} phase: {memory.total / GB:.2f} GB" for phase, memory in phases.items()]


def inference_lines(run: Run, shape: FluxShape, width: int, height: int, batch: int) -> list[str]:
    """What the inference command will need on the device while it denoises and decodes."""
    work = Work(0, 0, "AdamW", batch, width, height, run.cache.t5xxl_max_token_length or DEFAULT_LENGTH)
    setting = budget.setting_of(run.memory, shape, PRECISION_NAMES[run.training.mixed_precision or "bf16"])
    return _memory_lines("VRAM", cost.inference_vram(shape, setting, work))
