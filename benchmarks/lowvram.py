"""Peak VRAM, peak RAM, seconds per step and bytes over PCIe of FLUX.1 Fill training, for every way to keep the base.

Full size with random weights made on the device: `python -m benchmarks.lowvram` needs a CUDA card, and no checkpoint.
`--toy` runs the same code at toy size on whatever is there. Beside each measurement stands the forecast of
library/models/cost.py; the arm `diffusers+peft` is bf16 with diffusers' own checkpointing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from library.config.tables.network import NetworkTable
from library.flow.packing import image_ids
from library.memory import allocator
from library.memory.bnb import bitsandbytes
from library.memory.offload import LARGE, InHostMemory
from library.models import cost
from library.models.cost import GB, Setting, Work
from library.models.flux import FluxTransformer
from library.models.keymap import Entry, entries
from library.models.load import Residence, load_transformer
from library.models.shape import FluxShape
from library.networks import build

TOY = FluxShape(
    hidden=64, heads=2, mlp=256, double_blocks=2, single_blocks=4, text_width=64, pooled_width=32, axes_dim=(8, 12, 12)
)
RANK = 16
SETTINGS = {
    "bf16 resident": Setting("bf16"),
    "int8 resident": Setting("int8"),
    "nf4 resident": Setting("nf4"),
    "nf4, modulation in RAM": Setting("nf4", modulation_on_cpu=True),
    "int8, half streamed": Setting("int8", blocks_to_swap=28, modulation_on_cpu=True),
    "int8 streamed": Setting("int8", blocks_to_swap=57, modulation_on_cpu=True),
    "int8 streamed, checkpoints in RAM": Setting("int8", blocks_to_swap=57, modulation_on_cpu=True, offload=True),
    "nf4 streamed, checkpoints in RAM": Setting("nf4", blocks_to_swap=57, modulation_on_cpu=True, offload=True),
}


@dataclass(frozen=True)
class Result:
    """One arm at one size. GB are 1e9 bytes; None: not measurable on this device."""

    arm: str
    pixels: int
    seconds: float
    allocated_gb: float | None
    reserved_gb: float | None
    ram_gb: float
    pcie_gb: float
    forecast_vram_gb: float | None
    forecast_seconds: float | None


class RandomWeights:
    """A checkpoint of this shape whose tensors are drawn when they are read, on the device."""

    def __init__(self, shape: FluxShape, device: torch.device):
        self.shape, self.entries, self.device = shape, entries(shape), device

    def read(self, entry: Entry) -> Tensor:
        """Weights with a deviation of 0.02, zero biases, scales of one."""
        if entry.suffix == "bias":
            return torch.zeros(entry.shape, device=self.device, dtype=torch.bfloat16)
        if len(entry.shape) == 1:
            return torch.ones(entry.shape, device=self.device, dtype=torch.bfloat16)
        return torch.randn(entry.shape, device=self.device, dtype=torch.bfloat16) * 0.02

    def read_encoded(self, entry: Entry) -> None:
        """Nothing is stored quantised."""
        return None


def inputs(shape: FluxShape, pixels: int, text: int, device: torch.device) -> dict[str, Tensor]:
    """One random sample."""
    side = pixels // 8
    draw = lambda *size: torch.randn(1, *size, device=device, dtype=torch.bfloat16)
    return {
        "tokens": draw(side * side // 4, shape.in_channels), "text": draw(text, shape.text_width),
        "pooled": draw(shape.pooled_width), "timestep": torch.full((1,), 0.5, device=device),
        "guidance": torch.ones(1, device=device), "image_ids": image_ids(side, side),
    }  # fmt: skip


def measure(step: Callable[[], None], warm_up: int, steps: int, device: torch.device) -> tuple[float, float, float]:
    """(median seconds, allocated GB, reserved GB) of a training step."""
    times = []
    for number in range(warm_up + steps):
        if number == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _synchronise(device)
        begun = time.perf_counter()
        step()
        _synchronise(device)
        times.append(time.perf_counter() - begun)
    if device.type != "cuda":
        return statistics.median(times[warm_up:]), 0.0, 0.0
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return statistics.median(times[warm_up:]), peaks[0] / GB, peaks[1] / GB


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The 8-bit AdamW of the shipped configurations."""
    return bitsandbytes().optim.AdamW8bit(parameters, lr=1e-4)


def influx(setting: Setting, shape: FluxShape, pixels: int, text: int, device: torch.device, steps: int) -> Result:
    """One arm of InFlux."""
    blocks = min(setting.blocks_to_swap, shape.double_blocks + shape.single_blocks)
    setting = replace(setting, blocks_to_swap=blocks)
    residence = Residence(
        setting.precision, blocks_to_swap=blocks, ring=setting.ring, modulation_on_cpu=setting.modulation_on_cpu
    )
    model = load_transformer(RandomWeights(shape, device), device, torch.bfloat16, residence)
    model.runner.checkpointing = True
    if setting.offload:
        model.runner.keeper = InHostMemory(device, large=LARGE if device.type == "cuda" else 1)
    parameters = build(NetworkTable(network_dim=RANK), model).attach()
    optimizer = make_optimizer(parameters)
    given = inputs(shape, pixels, text, device)

    def step() -> None:
        model(**given).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, allocated, reserved = measure(step, 2, steps, device)
    trained = sum(parameter.numel() for parameter in parameters)
    work = Work(trained, RANK, "AdamW8bit", 1, pixels, pixels, text)
    card = cost.card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Result(
        "", pixels, seconds, allocated or None, reserved or None, _peak_ram(), _crossed(model, 2 + steps),
        cost.training_vram(shape, setting, work).total / GB,
        cost.step_seconds(shape, setting, work, card) if card else None,
    )  # fmt: skip


def _crossed(model: FluxTransformer, steps: int) -> float:
    """GB from host to device in one step."""
    runner = model.runner
    copied = runner.streamer.bytes_copied if runner.streamer else 0
    kept = runner.keeper.bytes_kept if isinstance(runner.keeper, InHostMemory) else 0
    return (copied + kept) / steps / GB


def diffusers_peft(shape: FluxShape, pixels: int, text: int, device: torch.device, steps: int) -> Result:
    """diffusers' transformer with PEFT's LoRA on the same linears, in bf16."""
    from peft import LoraConfig

    from benchmarks.counters import BLOCK_LINEARS, diffusers_model

    model = diffusers_model(shape).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=BLOCK_LINEARS))
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    given = inputs(shape, pixels, text, device)
    ids = {"img_ids": given["image_ids"].to(device), "txt_ids": torch.zeros(text, 3, device=device)}

    def step() -> None:
        output = model(
            hidden_states=given["tokens"], encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
            timestep=given["timestep"], guidance=given["guidance"], return_dict=False, **ids,
        )[0]  # fmt: skip
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, allocated, reserved = measure(step, 2, steps, device)
    return Result("diffusers+peft", pixels, seconds, allocated or None, reserved or None, _peak_ram(), 0.0, None, None)


def _peak_ram() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def run(arms: list[str], sizes: list[int], toy: bool, steps: int, text: int) -> list[Result]:
    """Every arm at every size; an arm that does not fit the card is left out of the list with a line that says so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    shape = TOY if toy else FluxShape()
    results = []
    for pixels in sizes:
        for arm in arms:
            try:
                if arm == "diffusers+peft":
                    results.append(diffusers_peft(shape, pixels, text, device, steps))
                else:
                    results.append(replace(influx(SETTINGS[arm], shape, pixels, text, device, steps), arm=arm))
            except torch.OutOfMemoryError:
                print(f"{arm} at {pixels} px does not fit this card")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| arm | px | s/step | estimate | VRAM allocated | reserved | forecast | RAM | PCIe per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    show = lambda value, form=".2f": "-" if value is None else format(value, form)
    for r in results:
        lines.append(
            f"| {r.arm} | {r.pixels} | {show(r.seconds, '.3f')} | {show(r.forecast_seconds, '.3f')} |"
            f" {show(r.allocated_gb)} | {show(r.reserved_gb)} | {show(r.forecast_vram_gb)} | {show(r.ram_gb)} |"
            f" {show(r.pcie_gb)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it as JSON, with the device's name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*SETTINGS, "diffusers+peft"]
    parser.add_argument("--arms", nargs="+", default=names, choices=names)
    parser.add_argument("--pixels", nargs="+", type=int, default=[512, 768, 1024])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--toy", action="store_true", help="toy size, on any device")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    allocator.configure()
    if not given.toy and not torch.cuda.is_available():
        parser.error("full size needs a CUDA card; --toy runs anywhere")
    results = run(given.arms, given.pixels, given.toy, given.steps, given.text)
    print(table(results))
    if given.output:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        record = {"device": name, "torch": torch.__version__, "toy": given.toy}
        record["results"] = [asdict(result) for result in results]
        given.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
