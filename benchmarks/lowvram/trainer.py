"""An arm of InFlux: the trainer itself (data read ahead, draws, modulation ahead, clipping) over one synthetic item."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.lowvram.arms import LEARNING_RATE, OPTIMIZER, RANK, Arm
from benchmarks.lowvram.child import Job, Step, Subject
from benchmarks.weights import RandomWeights
from library.conditioning.item import Condition
from library.config.run import Run
from library.config.tables import NetworkTable, OptimizerTable, TrainingTable
from library.data.batches import Batch
from library.data.order import BatchPlan, Member
from library.flow.packing import LATENT_SCALE
from library.memory.offload import InHostMemory
from library.models import setup
from library.models.flux import FluxTransformer
from library.models.text import TextEmbeddings
from library.training import assemble, rates, schedules
from library.training.data import TrainingData
from library.training.epochs import Epochs
from library.training.loop import Trained, Trainer
from library.training.objective import Objective
from library.training.prediction import Predictor
from library.training.processes import World

LATENT_CHANNELS = 16
NO_END = 1_000_000
ALONE = World()


@dataclass(frozen=True)
class OneItem:
    """A data set of one random item, as the cache would give it; stands in for `CachedDataset`."""

    batch: Batch

    def read(self, plan: BatchPlan) -> Batch:
        """The item, at the place that is asked for."""
        return replace(self.batch, position=plan.position)


def item(job: Job, pixels: int) -> OneItem:
    """A random item of this size on the CPU, in the cache's dtypes."""
    shape, side = job.shape, pixels // LATENT_SCALE
    draw = lambda *size: torch.randn(1, *size, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, pixels, pixels)
    mask[..., pixels // 2 :] = 1.0
    return OneItem(
        Batch(
            mean=draw(LATENT_CHANNELS, side, side), std=None,
            condition=Condition(draw(LATENT_CHANNELS, side, side), mask),
            text=TextEmbeddings(draw(job.text, shape.text_width), draw(shape.pooled_width)),
            clip_ids=torch.zeros(1, 77, dtype=torch.long), t5_ids=torch.zeros(1, job.text, dtype=torch.long),
            loss_weight=torch.ones(1), changed=torch.ones(1, 1, side, side), item_keys=("item",), captions=("",),
            position=0,
        )
    )  # fmt: skip


def configuration(arm: Arm, job: Job) -> Run:
    """The run that this arm is."""
    return Run(
        name="train",
        network=NetworkTable(network_dim=RANK),
        optimizer=OptimizerTable(optimizer_type=OPTIMIZER, learning_rate=LEARNING_RATE),
        training=TrainingTable(max_train_steps=NO_END, mixed_precision="bf16", seed=0),
        memory=arm.table(job.shape, job.toy),
    )


def influx(job: Job, arm: Arm, device: torch.device) -> Subject:
    """Model and network as the training job makes them."""
    run = configuration(arm, job)
    model = setup.load(RandomWeights(job.shape, device), device, torch.bfloat16, run.memory)
    setup.set_up_training(model, run.memory)
    if job.toy and isinstance(model.runner.keeper, InHostMemory):
        model.runner.keeper.large = 1  # nothing of a toy is as large as what is worth a trip
    choice = rates.choose_optimizer(run.optimizer)
    trained = assemble.make_trained(run, choice, model, None, ALONE, "bf16", 0, None)
    at = lambda pixels: steps(run, trained, model, item(job, pixels), device)
    return Subject(at, sum(p.numel() for p in trained.network.trained()), lambda: crossed(model))


@contextlib.contextmanager
def steps(run: Run, trained: Trained, model: FluxTransformer, data: OneItem, device: torch.device) -> Iterator[Step]:
    """A function that takes one step of the trainer, put together as library/training/job.py does it."""
    if isinstance(model.runner.keeper, InHostMemory):
        model.runner.keeper.free.clear()  # page-locked buffers of another size
    members = [Member("item", repeats=1000, group=("item",), batch_size=1, num_sizes=1)]
    objective, predictor = Objective(run.training, 0), Predictor(model)
    source = TrainingData(data, Epochs(members, 0, ALONE.size), ALONE, run.training.dataloader_num_workers)
    if predictor.works_ahead:
        source.on_read = lambda batch, place: predictor.prepare(batch, *objective.draw_times(batch, place))
    schedule = schedules.of_table(run.optimizer, NO_END)
    trainer = Trainer(trained, source, predictor, objective, schedule, run.training, run.optimizer, ALONE, device)
    taken = trainer.steps()
    try:
        yield lambda: next(taken).loss
    finally:
        taken.close()
        trained.optimizer.zero_grad()


def crossed(model: FluxTransformer) -> int:
    """Bytes that streaming and offloading have brought to the device; an offloaded checkpoint comes back once."""
    streamer, keeper = model.runner.streamer, model.runner.keeper
    weights = streamer.bytes_copied if streamer is not None else 0
    return weights + (keeper.bytes_kept if isinstance(keeper, InHostMemory) else 0)
