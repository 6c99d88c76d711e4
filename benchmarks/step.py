"""The whole training step against the bare model: forward, backward and optimizer in hand-written code.

Everything the trainer adds (data, draws, loss, clipping, schedule, accounting, metrics, progress) must cost at most 2%.
Both arms train the same model and network on samples of one size, so the bare one is what is left if a trainer is taken
away: fixed tensors that are there already, one loss, `backward`, torch's AdamW. They alternate in one process, on one
thread, in process time (the thread that reads ahead included): `python -m benchmarks.step`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.config import load
from library.models.shape import axes_for
from library.training import assemble, processes, rates, schedules
from library.training.equipment import equip
from library.training.loop import Trainer
from library.training.objective import Objective
from library.training.prediction import Predictor
from library.training.site import opened

ROOT = Path(__file__).resolve().parent.parent
GATE = 1.02
CONFIG = """
[model]
pretrained_model_name_or_path = "base"
[[datasets]]
resolution = {pixels}
enable_bucket = false
train_batch_size = 1
[[datasets.subsets]]
mode = "edit"
image_dir = "images"
target_dir = "images"
caption_dir = "captions"
[cache]
t5xxl_max_token_length = {text}
[network]
network_dim = 16
[training]
max_train_steps = 1000000
mixed_precision = "no"
seed = 0
device = "cpu"
[memory]
gradient_checkpointing = true
[saving]
output_dir = "output"
"""


@dataclass(frozen=True)
class Size:
    """The model and the sample that are trained: hidden 256 with 2 + 4 blocks, as small as overhead still shows."""

    heads: int = 8
    head_dim: int = 32
    double: int = 2
    single: int = 4
    pixels: int = 256
    text: int = 512


def prepare(folder: Path, size: Size) -> None:
    """A random base of this size, eight pairs, and their cache."""
    from PIL import Image

    from tests.tiny import tiny_base

    shape = {"heads": size.heads, "head_dim": size.head_dim, "double": size.double, "single": size.single}
    tiny_base(folder / "base", axes=axes_for(size.head_dim), **shape)
    for name in ("images", "captions"):
        (folder / name).mkdir()
    for number in range(8):
        colour = (30 * number, 255 - 30 * number, 128)
        Image.new("RGB", (size.pixels, size.pixels), colour).save(folder / "images" / f"{number}.png")
        (folder / "captions" / f"{number}.txt").write_text(f"make it {number}", encoding="utf-8")
    config = folder / "config.toml"
    config.write_text(CONFIG.format(pixels=size.pixels, text=size.text), encoding="utf-8")
    command = [sys.executable, str(ROOT / "influx_cache.py"), "--config_file", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@contextlib.contextmanager
def steps_of(config: Path) -> Iterator[tuple[Callable[[], None], Trainer]]:
    """A function that takes one whole step of the trainer, logging and progress included; and the trainer."""
    run = load(["--config_file", str(config)], "train")
    choice, world, device = (
        rates.choose_optimizer(run.optimizer),
        processes.world_from_environment(-1),
        torch.device("cpu"),
    )
    with opened(run, world, device) as site:
        from library.models import setup

        transformer = setup.load(site.base.transformer_file, device, torch.float32, run.memory)
        setup.set_up_training(transformer, run.memory)
        trained = assemble.make_trained(run, choice, transformer, None, world, site.mixed, site.start.seed, None)
        data = assemble.make_data(site.dataset, world, trained.progress, site.start.seed, None, 0)
        schedule = schedules.of_table(run.optimizer, assemble.num_steps(run.training, data, trained.progress))
        objective = Objective(run.training, site.start.seed)
        trainer = Trainer(
            trained, data, Predictor(transformer), objective, schedule, run.training, run.optimizer, world, device
        )
        conduct = equip(site, trainer, transformer)
        conduct.begin()
        steps = trainer.steps()
        try:
            yield lambda: conduct.after_step(next(steps)), trainer
        finally:
            conduct.close("benchmark done")


def bare_step(trainer: Trainer, size: Size) -> Callable[[], None]:
    """Forward, backward and optimizer on fixed tensors, of the trainer's own model and network."""
    from library.flow.packing import image_ids

    model, side = trainer.predict.transformer, size.pixels // 8
    parameters = trainer.parameters
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    draw = lambda *shape: torch.randn(1, *shape)
    given = {
        "tokens": draw(side * side // 4, model.shape.in_channels), "text": draw(size.text, model.shape.text_width),
        "pooled": draw(model.shape.pooled_width), "timestep": torch.rand(1), "guidance": torch.ones(1),
        "image_ids": image_ids(side, side),
    }  # fmt: skip
    target = draw(side * side // 4, model.shape.out_channels)

    def step() -> None:
        loss = torch.nn.functional.mse_loss(model(**given), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclass(frozen=True)
class Ratio:
    """Whole over bare step, over interleaved repeats.

    ratio: the median. half_interquartile_range: of single repeats; a busy machine widens it. standard_error: of the
    median. of_sums: all whole steps over all bare ones, so that what is rarely due (the report) counts as well.
    """

    ratio: float
    half_interquartile_range: float
    standard_error: float
    of_sums: float
    repeats: int


def ratio(bare: Callable[[], None], whole: Callable[[], None], repeats: int) -> Ratio:
    """Measure both alternately, the first one in turn."""
    bare(), whole()
    ratios, sums = [], {bare: 0.0, whole: 0.0}
    for repeat in range(repeats):
        first, second = (bare, whole) if repeat % 2 == 0 else (whole, bare)
        times = {first: _process_time(first), second: _process_time(second)}
        ratios.append(times[whole] / times[bare])
        sums = {arm: sums[arm] + times[arm] for arm in sums}
    low, middle, high = statistics.quantiles(ratios, n=4)
    # For normally distributed ratios: sigma is the half range / 0.674, a median's error 1.253 sigma / sqrt(n).
    spread = (high - low) / 2
    error = 1.253 * spread / 0.674 / len(ratios) ** 0.5
    return Ratio(middle, spread, error, sums[whole] / sums[bare], len(ratios))


def _process_time(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def run(size: Size, repeats: int) -> Ratio:
    """Prepare everything in a temporary folder and measure the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, size)
        with steps_of(folder / "config.toml") as (whole, trainer):
            return ratio(bare_step(trainer, size), whole, repeats)


def main() -> None:
    """Print the ratio and hold it to the gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=121)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured = run(Size(), given.repeats)
    print(
        f"whole step / bare step: {measured.ratio:.4f} +- {measured.standard_error:.4f} (gate: {GATE}); single repeats"
        f" +- {measured.half_interquartile_range:.3f}; of the sums {measured.of_sums:.4f}"
    )
    if given.output:
        given.output.write_text(json.dumps(asdict(measured), indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if measured.ratio <= GATE else 1)


if __name__ == "__main__":
    main()
