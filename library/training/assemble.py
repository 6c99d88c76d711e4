"""The parts of a run, made from their tables and put together."""

from torch import nn

from library.config.run import Run
from library.config.tables import TrainingTable
from library.data.cached import CachedDataset
from library.errors import ConfigError
from library.memory.optimizer_state import keep_state_in_ram
from library.models.flux import FluxTransformer
from library.networks import build as build_network
from library.networks.clip import Together, build_clip
from library.networks.network import Network
from library.training import checkpoint, processes, rates
from library.training.data import TrainingData
from library.training.ema import Ema
from library.training.epochs import Epochs
from library.training.loop import Trained
from library.training.loss_scale import LossScale
from library.training.optimizers import OptimizerChoice, OptimizerSet
from library.training.processes import World
from library.training.progress import Progress
from library.training.state import RunState


def rate_scale(run: Run, world: World) -> float:
    """What scale_lr multiplies every rate by: accumulation x batch x processes."""
    if not run.optimizer.scale_lr:
        return 1.0
    sizes = {dataset.train_batch_size for dataset in run.datasets}
    if len(sizes) > 1:
        raise ConfigError(f"scale_lr needs one train_batch_size for all data sets, not {sorted(sizes)}")
    return float(run.training.gradient_accumulation_steps * sizes.pop() * world.size)


def make_trained(
    run: Run,
    choice: OptimizerChoice,
    transformer: FluxTransformer,
    clip: nn.Module | None,
    world: World,
    mixed: str,
    seed: int,
    saved: RunState | None,
) -> Trained:
    """Network, optimizer and all else that training changes, as new or as saved. `clip`: where it is trained too."""
    network: Network | Together = build_network(run.network, transformer, seed)
    if clip is not None:
        network = Together(network, build_clip(run.network, clip, seed))
    network.attach()
    if run.optimizer.full_bf16:
        _halve(network)
    processes.same_parameters(network.named_trained(), world)
    groups = rates.parameter_groups(run.optimizer, network.parameters_by_group(), rate_scale(run, world))
    optimizer = OptimizerSet(choice, groups)
    if run.memory.optimizer_offload:
        for single in optimizer.optimizers:
            keep_state_in_ram(single, run.memory.pin_memory)
    optimizer.training(True)
    ema = None
    if run.training.use_ema:
        ema = Ema(network.named_trained(), run.training.ema_decay, "cpu" if run.training.ema_cpu else None)
    trained = Trained(network, optimizer, Progress(), LossScale.for_precision(mixed), ema)
    if saved is not None:
        checkpoint.restore(trained, saved)
    return trained


def _halve(network: Network | Together) -> None:
    for parameter in network.trained():
        parameter.data = parameter.data.bfloat16()


def make_data(
    dataset: CachedDataset, world: World, progress: Progress, seed: int, saved: RunState | None, ahead: int
) -> TrainingData:
    """The data from where the run stands. A changed number of processes cuts the rest of the epoch anew."""
    segments = [list(segment) for segment in saved.scalars["segments"]] if saved is not None else []
    if segments and segments[-1][0] == world.size:
        segments.pop()
    elif segments:
        progress.position = 0
    epochs = Epochs(dataset.order.members, seed, world.size, progress.epoch, segments)
    return TrainingData(dataset, epochs, world, ahead)


def num_steps(table: TrainingTable, data: TrainingData, progress: Progress) -> int:
    """The step a run ends with."""
    if table.max_train_steps is not None:
        return table.max_train_steps
    return progress.step + data.steps_left(progress, table.gradient_accumulation_steps, table.max_train_epochs)
