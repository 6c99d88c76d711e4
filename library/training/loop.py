"""The training loop: draw, predict, weigh the error, step. What happens around it is decided by the job."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from library.config.tables import OptimizerTable, TrainingTable
from library.errors import NonFiniteError
from library.flow.draws import generator, key_seed
from library.networks.clip import Together
from library.networks.network import Network
from library.training import processes
from library.training.data import Micro, TrainingData, Window
from library.training.ema import Ema
from library.training.loss_scale import LossScale
from library.training.objective import Objective, Predict
from library.training.optimizers import OptimizerSet
from library.training.processes import World
from library.training.progress import Progress
from library.training.rounding import float32_step
from library.training.schedules import Schedule

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """Everything that changes while training: the whole of it is saved, and nothing else is."""

    network: Network | Together
    optimizer: OptimizerSet
    progress: Progress
    scale: LossScale
    ema: Ema | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step has to tell. `norm`: of the gradient before clipping. `stepped`: False if left out."""

    loss: float
    norm: float
    seconds: float
    stepped: bool
    ends_epoch: bool


class Trainer:
    """Takes optimizer steps until the last one is done. Each call of `steps` yields after every step."""

    def __init__(
        self,
        trained: Trained,
        data: TrainingData,
        predict: Predict,
        objective: Objective,
        schedule: Schedule,
        training: TrainingTable,
        optimizer: OptimizerTable,
        world: World,
        device: torch.device,
        norm_limit: float | None = None,
    ):
        self.trained, self.data, self.predict, self.objective = trained, data, predict, objective
        self.schedule, self.training, self.table = schedule, training, optimizer
        self.world, self.device, self.norm_limit = world, device, norm_limit
        self.seed = objective.seed
        self.bucket, self.stepping = (0, 0), False  # for the message when memory runs out
        self.parameters: list[nn.Parameter] = list(trained.optimizer.parameters())
        ours, theirs = {id(p) for p in self.parameters}, {id(p) for p in trained.network.trained()}
        assert ours == theirs, "the optimizer must hold exactly what the network trains"

    def steps(self) -> Iterator[StepResult]:
        """Train from where the progress stands to the schedule's last step."""
        progress = self.trained.progress
        while progress.step < self.schedule.num_steps:
            for window in self.data.windows(progress, self.training.gradient_accumulation_steps):
                started = time.monotonic()
                loss = self.accumulate(window)
                norm, stepped = self.update(window, loss)
                ends_epoch = self.advance(window)
                yield StepResult(loss, norm, time.monotonic() - started, stepped, ends_epoch)
                if progress.step >= self.schedule.num_steps:
                    return

    def accumulate(self, window: Window) -> float:
        """Add up the window's gradients; returns its mean loss over all items of all processes."""
        total = torch.zeros((), device=self.device)
        for micro in window.micros:
            loss = self.loss(micro) / window.num_items
            (loss * self.trained.scale.value).backward()
            total += loss.detach()
        return processes.sum_values([total.item()], self.world, self.device)[0]

    def loss(self, micro: Micro) -> torch.Tensor:
        """The sum of the items' losses of one forward pass."""
        place, self.bucket = micro.place, micro.batch.bucket
        torch.manual_seed(key_seed(self.seed, "forward", place.micro_step, place.first))
        self.trained.network.begin_step(self.seed, place.micro_step, micro.batch.item_keys)
        losses = self.objective.losses(self.predict, micro.batch, place, self.device)
        return losses.sum() if micro.counts else 0.0 * losses.sum()

    def update(self, window: Window, loss: float) -> tuple[float, bool]:
        """Clip and step, unless a gradient is not finite: one such step would spoil the weights for good."""
        trained, step = self.trained, self.trained.progress.step
        processes.sum_gradients(self.parameters, self.world)
        norm = clip(self.parameters, self.table.max_grad_norm, trained.scale.value)
        finite = norm < float("inf") and abs(loss) < float("inf")  # both false for NaN as well
        if finite:
            trained.optimizer.set_rates(self.schedule.factor(step))
            torch.manual_seed(key_seed(self.seed, "optimizer", step))
            self.stepping = True
            with float32_step(self.parameters, generator(self.seed, "rounding", step)):
                trained.optimizer.step()
            self.stepping = False
            if self.norm_limit is not None:
                trained.network.clamp_norms(self.norm_limit)
            if trained.ema is not None:
                trained.ema.update()
        trained.optimizer.zero_grad()
        self.count(finite, window)
        return norm, finite

    def count(self, finite: bool, window: Window) -> None:
        """Count steps that were left out. Raises NonFiniteError after too many in a row."""
        progress, scale = self.trained.progress, self.trained.scale
        blamed = not finite and not scale.can_fall  # an overflow under loss scaling only lowers the scale
        scale.after(finite)
        if finite or not blamed:
            progress.overflows += not finite
            progress.skipped_in_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_row += 1
        names = ", ".join(self.data.names(window)[:8])
        log.warning("step %d left out: a loss or gradient is NaN or infinite (items: %s)", progress.step + 1, names)
        if progress.skipped_in_row >= self.training.max_nonfinite_steps:
            raise NonFiniteError(
                f"{progress.skipped_in_row} steps in a row had NaN or infinite gradients, the last at step "
                f"{progress.step + 1} (items: {names}). The weights were not touched by them. Lower learning_rate, use "
                'mixed_precision = "bf16" instead of fp16, or look at these items'
            )

    def advance(self, window: Window) -> bool:
        """Move on by one window; returns whether it was the last of its epoch."""
        progress = self.trained.progress
        progress.step += 1
        progress.micro_step += len(window.groups)
        progress.position += len(window.groups)
        ends_epoch = self.data.is_last(progress)
        if ends_epoch:
            progress.epoch, progress.position = progress.epoch + 1, 0
        return ends_epoch


@torch.no_grad()
def clip(parameters: list[nn.Parameter], max_norm: float, scale: float) -> float:
    """Undo the loss scale, and scale gradients down to `max_norm` (0: leave them). Returns the norm before that.

    The norm is taken in float32 over exactly the trained parameters. A norm that is not finite changes nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_(gradients, 1.0 / scale)
    norms = torch._foreach_norm([gradient.float() for gradient in gradients])
    norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
    if 0 < max_norm < norm < float("inf"):
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm
