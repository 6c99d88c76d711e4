"""What the ready configurations really hold on the device, counted byte by byte, beside what the memory model says.

One training step of the full-size model per `config_examples/fill_edit_*.toml`, on fake tensors, exactly as its tables
say (precision, streaming, modulation in RAM, checkpointing, offload, rank, batch, size): `python -m benchmarks.plan`.
Counted on the device: resident weights and biases, the ring's slots, the network, its optimizer state, and the largest
sum of what the step allocates, gradients included. Left out, because they live in RAM: the streamed blocks' buffers,
modulation weights, offloaded checkpoints. The allocator's rounding and the CUDA context are not part of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.counters import Counter, fake_tensors
from benchmarks.weights import ShapesOnly
from library.config import load
from library.config.run import Run
from library.flow.packing import image_ids
from library.forecast import work_of
from library.memory.offload import InHostMemory
from library.models import budget, cost, setup
from library.models.cost import GB, Work
from library.models.flux import FluxTransformer
from library.models.load import load_transformer
from library.models.shape import FluxShape
from library.networks import build

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "plan.json"
TOLERANCE = 0.05
OUTSIDE = ("allocator", "CUDA context")
"""Parts of the model that no counted byte answers to."""
SETTING_KEYS = (
    "precision", "blocks_to_swap", "ring", "modulation_on_cpu", "checkpointing", "offload", "keep", "save_attention",
)  # fmt: skip
WORK_KEYS = ("trained", "rank", "optimizer", "batch", "width", "height", "text", "optimizer_offload")
STATE_BLOCK, STATE_MINIMUM = 256, 4096
"""bitsandbytes: values that share a scale in an 8-bit state, and the size below which a state stays in fp32."""


@dataclass(frozen=True)
class Counted:
    """Bytes on the device. `dynamic`: the step's peak with gradients; `activations`: the same without them."""

    weights: int
    ring: int
    network: int
    gradients: int
    optimizer: int
    activations: float
    dynamic: float

    @property
    def total(self) -> float:
        """The most bytes that are alive at once: while the step runs, or while the optimizer does."""
        resting = self.weights + self.ring + self.network + self.optimizer
        return resting + max(self.dynamic, self.gradients)


@dataclass(frozen=True)
class Compared:
    """One configuration, as the planner sees it: what was counted, and the memory model's parts that answer to it."""

    config: str
    setting: dict[str, object]
    work: dict[str, object]
    counted: Counted
    forecast: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Forecast over count."""
        return sum(self.forecast.values()) / self.counted.total


def examples() -> list[Path]:
    """The ready configurations."""
    return sorted((ROOT / "config_examples").glob("fill_edit_*.toml"))


def without_pictures(work: Work) -> Work:
    """The same training step, if the memory model knows previews and validation as phases of their own."""
    pictures = {one.name for one in fields(Work)} & {"preview", "held_out"}
    return replace(work, **dict.fromkeys(pictures))


def described(run: Run, shape: FluxShape) -> dict[str, dict[str, object]]:
    """What a configuration's numbers depend on, in JSON's types."""
    setting, work = budget.setting_of(run.memory, shape, "bf16"), work_of(run, shape)
    known = {
        "setting": {name: getattr(setting, name) for name in SETTING_KEYS},
        "work": {name: getattr(work, name) for name in WORK_KEYS} | {"micro_steps": micro_steps(run)},
    }
    return json.loads(json.dumps(known))


def micro_steps(run: Run) -> int:
    """Batches of one step that differ: the first finds no gradients, all later ones find all of them."""
    return min(2, run.training.gradient_accumulation_steps)


def forecast(run: Run, shape: FluxShape) -> dict[str, float]:
    """The memory model's parts for a configuration, in bytes, less what is never counted."""
    setting = budget.setting_of(run.memory, shape, "bf16")
    parts = cost.training_vram(shape, setting, without_pictures(work_of(run, shape))).parts
    return {name: size for name, size in parts.items() if name not in OUTSIDE}


def count(run: Run, shape: FluxShape) -> Counted:
    """Load, attach and train one step on fake tensors."""
    num_blocks = shape.double_blocks + shape.single_blocks
    residence = setup.residence(run.memory, torch.bfloat16, num_blocks)
    work = work_of(run, shape)
    with fake_tensors():
        model = load_transformer(ShapesOnly(shape, residence.precision), "cpu", torch.bfloat16, residence)
        setup.set_up_training(model, run.memory)
        resident, ring = resident_bytes(model, run.memory.modulation_on_cpu)
        parameters = build(run.network, model).attach()
        assert sum(parameter.numel() for parameter in parameters) == work.trained
        activations, dynamic = peaks(model, parameters, work, micro_steps(run))
    sizes = [parameter.numel() for parameter in parameters]
    return Counted(resident, ring, 4 * sum(sizes), 4 * sum(sizes), state_bytes(sizes, work), activations, dynamic)


def resident_bytes(model: FluxTransformer, modulation_on_cpu: bool) -> tuple[int, int]:
    """Bytes of the base on the device, and of the ring's slots."""
    streamer = model.runner.streamer
    away = {id(storage) for block in streamer.blocks.values() for storage in block.storages} if streamer else set()
    in_ram = {id(linear) for linear in model.vector_linears()} if modulation_on_cpu else set()
    total = 0
    for module in model.modules():
        if id(module) not in in_ram:
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    for linear in model.linears().values():
        if linear.storage is not None and id(linear) not in in_ram and id(linear.storage) not in away:
            total += linear.storage.num_bytes
    return total, sum(slot.buffer.nbytes for slot in streamer.slots) if streamer else 0


def peaks(model: FluxTransformer, parameters: list[Tensor], work: Work, micro_steps: int) -> tuple[float, float]:
    """The largest sum of live bytes of one step: without the gradients of what is trained, and with them."""
    given = inputs(model.shape, work)
    # Both are there before the step begins: the rotation table is remembered, modulation is computed a batch ahead.
    model._rotation_table(given["image_ids"])
    with torch.no_grad():
        modulation = model.modulate(given["timestep"], given["guidance"], given["pooled"])
    counter = Counter()
    with counter:
        for _ in range(micro_steps):
            model(**given, modulation=modulation).float().square().mean().backward()
    host = hosted(model)
    gradients = {parameter.grad.untyped_storage()._cdata for parameter in parameters}
    return counter.peak(host | gradients) * GB, counter.peak(host) * GB


def hosted(model: FluxTransformer) -> set[int]:
    """The storages of offloaded checkpoints: after a step all of them are free again."""
    keeper = model.runner.keeper
    if not isinstance(keeper, InHostMemory):
        return set()
    return {tensor.untyped_storage()._cdata for tensors in keeper.free.values() for tensor in tensors}


def inputs(shape: FluxShape, work: Work) -> dict[str, Tensor]:
    """A batch of this size."""
    height, width = work.height // 8, work.width // 8
    draw = lambda *size: torch.empty(work.batch, *size, dtype=torch.bfloat16)
    return {
        "tokens": draw(height * width // 4, shape.in_channels), "text": draw(work.text, shape.text_width),
        "pooled": draw(shape.pooled_width), "timestep": torch.empty(work.batch), "guidance": torch.empty(work.batch),
        "image_ids": image_ids(height, width),
    }  # fmt: skip


def state_bytes(sizes: list[int], work: Work) -> int:
    """What the optimizer keeps on the device for parameters of these sizes; 0 if it lives in RAM.

    bitsandbytes' 8-bit AdamW: two bytes and the maxima of their blocks; Prodigy: four values in fp32.
    """
    if work.optimizer_offload:
        return 0
    if work.optimizer == "Prodigy":
        return 16 * sum(sizes)
    assert work.optimizer == "AdamW8bit", f"count the state of {work.optimizer} first"
    small = sum(8 * size for size in sizes if size < STATE_MINIMUM)
    return small + sum(2 * (size + 4 * -(-size // STATE_BLOCK)) for size in sizes if size >= STATE_MINIMUM)


def compare(config: Path, shape: FluxShape) -> Compared:
    """Count one configuration and forecast it."""
    run = load(["--config_file", str(config)], "train")
    return Compared(config.stem, **described(run, shape), counted=count(run, shape), forecast=forecast(run, shape))


def table(results: list[Compared]) -> str:
    """Counted and forecast side by side, in GB, as Markdown. Of the gradients, what they add to the step's peak."""
    names = ("base weights", "streaming ring", "network and gradients", "optimizer", "activations", "all")
    lines = [f"| counted / forecast, GB | {' | '.join(names)} | off by |", "|---" * (len(names) + 2) + "|"]
    for result in results:
        counted, parts = result.counted, dict(result.forecast)
        beside = max(0.0, counted.dynamic - counted.activations)
        ours = (
            counted.weights, counted.ring, counted.network + beside, counted.optimizer, counted.activations,
            counted.total,
        )  # fmt: skip
        known = [parts.pop(name, 0.0) for name in names[:2]]
        held = [name for name in parts if name.startswith(("network", "gradients"))]
        network = sum(parts.pop(name) for name in held)
        theirs = (*known, network, parts.pop("optimizer", 0.0), sum(parts.values()), sum(result.forecast.values()))
        cells = [f"{a / GB:.3f} / {b / GB:.3f}" for a, b in zip(ours, theirs)]
        lines.append(f"| {result.config} | {' | '.join(cells)} | {result.ratio - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", type=Path, default=examples())
    parser.add_argument("--output", type=Path, help=f"for instance {RECORD.relative_to(ROOT)}")
    given = parser.parse_args()
    results = [compare(config, FluxShape()) for config in given.configs]
    print(table(results))
    if given.output:
        record = [asdict(result) | {"ratio": result.ratio} for result in results]
        given.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
