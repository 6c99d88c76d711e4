"""The training job from a valid configuration to a finished network, in the order in which things can go wrong.

What the user gave is checked first, then the output folder and the cache; weights come last.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from library.config.run import Run
from library.errors import NonFiniteError, OutOfMemory, Stopped
from library.memory.capability import DTYPES
from library.memory.device import choose_device
from library.models import setup
from library.models.base import Base
from library.training import assemble, hub, plan, processes, rates, schedules, signals, state, trackers
from library.training.conduct import Conduct
from library.training.equipment import equip
from library.training.hub import Destination
from library.training.loop import Trainer
from library.training.objective import Objective
from library.training.optimizers import OptimizerChoice, try_out
from library.training.out_of_memory import BETWEEN_STEPS, Moment, advice, is_out_of_memory
from library.training.outlook import outlook
from library.training.prediction import Predictor
from library.training.probing import Probe
from library.training.publish import publish, publish_left
from library.training.site import Site, opened
from library.training.start import CONFIG_FILE

log = logging.getLogger(__name__)


def train(run: Run) -> int:
    """Train. Returns the exit code."""
    choice = rates.choose_optimizer(run.optimizer)
    trackers.wanted(run.logging.report_to)
    schedules.schedule_arguments(run.optimizer)
    destination = hub.check(run.saving)
    for line in outlook(run, Base.open(run.model)).network_lines():
        log.info("%s", line)
    world = processes.world_from_environment(run.training.local_rank)
    device = choose_device(run.training.device)
    try_out(choice, run.optimizer.learning_rate, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.training.allow_tf32
    if signals.was_launched():
        signals.die_with_parent()
    processes.join(world, device)
    # what was chosen for a budget follows the RAM that was free a moment ago: all take the main process's choice
    run = run.model_copy(update={"memory": processes.from_main(run.memory, world)})
    try:
        with opened(run, world, device) as site:
            if site.start.done:
                log.info("%s", site.start.done)
                if destination is not None and site.output is not None:
                    publish_left(destination, site.start.folder)
                return 0
            return _train(site, choice, destination)
    finally:
        processes.leave(world)


def _train(site: Site, choice: OptimizerChoice, destination: Destination | None) -> int:
    run, saved = site.run, site.start.saved()
    schedules.of_table(run.optimizer, plan.num_steps(run, site.dataset.listing, site.world.size))
    transformer = setup.load(site.base.transformer_file, site.device, DTYPES[site.mixed], run.memory)
    setup.set_up_training(transformer, run.memory)
    clip = site.base.load_clip(site.device, DTYPES[site.mixed]) if run.network.train_text_encoder else None
    trained = assemble.make_trained(run, choice, transformer, clip, site.world, site.mixed, site.start.seed, saved)
    if site.sharded:
        from library.training.sharding import shard_blocks

        shard_blocks(transformer, site.world, site.device)
    data = assemble.make_data(
        site.dataset, site.world, trained.progress, site.start.seed, saved, run.training.dataloader_num_workers
    )
    schedule = schedules.of_table(run.optimizer, assemble.num_steps(run.training, data, trained.progress))
    objective = Objective(run.training, site.start.seed)
    predictor = Predictor(transformer, clip)
    if predictor.works_ahead:
        data.on_read = lambda batch, place: predictor.prepare(batch, *objective.draw_times(batch, place))
    trainer = Trainer(
        trained, data, predictor, objective, schedule, run.training, run.optimizer, site.world,
        site.device, run.network.scale_weight_norms,
    )  # fmt: skip
    conduct = equip(site, trainer, transformer) if site.output is not None else None
    try:
        finished = _steps(site, trainer, conduct)
    except BaseException as error:
        if conduct is not None:
            conduct.close(_ending(site, error))
        raise
    if conduct is not None:
        with _explained(site, trainer, conduct, BETWEEN_STEPS):
            _finish(site, conduct, finished, destination)
    processes.wait_for_all(site.world)
    return 0


def _ending(site: Site, error: BaseException) -> str:
    """How a run that did not finish ended, for its report."""
    if isinstance(error, Stopped):
        return f"stopped by {site.stop.reason or 'a signal to another process'}"
    if isinstance(error, NonFiniteError):
        return "stopped: gradients were not finite"
    if isinstance(error, OutOfMemory):
        return "stopped: out of memory"
    return "stopped by a second Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"


def _steps(site: Site, trainer: Trainer, conduct: Conduct | None) -> bool:
    """Run to the last step; returns False if it ended early on purpose. Raises Stopped, NonFiniteError, OutOfMemory."""
    _probe(site, trainer, conduct)
    if conduct is not None:
        with _explained(site, trainer, conduct, BETWEEN_STEPS):
            conduct.begin()
    if _agree(site, conduct is not None and conduct.is_out_of_patience())[1]:
        return False  # it was killed between its last state and its end
    steps, begun = trainer.steps(), False
    while True:
        with _explained(site, trainer, conduct), _kept(site, conduct):
            result = next(steps, None)
        if result is None:
            return True
        if site.output is not None and result.stepped and not begun:
            site.output.has_begun()
            begun = True
        with _explained(site, trainer, conduct, BETWEEN_STEPS):
            early = conduct.after_step(result) if conduct is not None else False
        code, early = _agree(site, early)
        if early:
            return False
        if code and trainer.trained.progress.step < trainer.schedule.num_steps:
            raise _stopped(site, conduct, code)


def _probe(site: Site, trainer: Trainer, conduct: Conduct | None) -> None:
    """Try the largest moments out, on zeros, so that a card that is too small shows before the first step."""
    if not site.run.memory.memory_probe or site.device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(site.device)
    probe = Probe(site, trainer, conduct.painter if conduct is not None else None)
    try:
        tried = []
        for attempt in probe.attempts():
            with _explained(site, trainer, conduct, attempt.moment):
                attempt.run()
            tried.append(attempt.moment.words)
        peak = torch.cuda.max_memory_reserved(site.device) / 1e9
        log.info("it fits: %.1f GB reserved at most (tried: %s)", peak, "; ".join(tried))
    finally:
        probe.close()


def _agree(site: Site, early: bool) -> tuple[int, bool]:
    """Whether any process was asked to stop (its exit code), and whether the main one wants to stop early."""
    if site.output is not None:
        site.stop.look_for_file()
    code = site.stop.exit_code
    if site.world.size == 1:
        return code, early
    asked = [float(code == signals.EXIT_TERMINATE), float(code == signals.EXIT_INTERRUPT), float(early)]
    terminated, interrupted, stopping = processes.sum_values(asked, site.world, site.device)
    code = signals.EXIT_TERMINATE if terminated else signals.EXIT_INTERRUPT if interrupted else 0
    return code, stopping > 0


def _stopped(site: Site, conduct: Conduct | None, code: int) -> Stopped:
    if conduct is None:
        return Stopped("stopped together with the main process", code)
    saved = conduct.keeper.interrupted()
    reason = site.stop.reason or "a signal to another process"
    step = conduct.trained.progress.step
    return Stopped(
        f"stopped by {reason} after step {step} of {conduct.num_steps}. Network and state are saved ({saved}). "
        f"Run {site.again} to continue",
        code,
    )


@contextlib.contextmanager
def _kept(site: Site, conduct: Conduct | None) -> Iterator[None]:
    """Too many steps that are not finite: the weights of before are saved, and the message says where to go on."""
    try:
        yield
    except NonFiniteError as error:
        if conduct is None:
            raise
        progress = conduct.trained.progress
        if progress.step < progress.skipped:  # the one that raised is no step, but counts
            raise NonFiniteError(
                f"{error}. No step was ever good, so nothing is saved and any key may change"
            ) from error
        older = state.newest(conduct.folder, conduct.run.saving.output_name)[0]
        progress.skipped_in_row = 0  # so that a run that goes on is given as many tries again
        kept = conduct.keeper.interrupted()
        back = (
            f". If it does not get over this step, go further back: --resume {older}"
            if older not in (None, kept)
            else ""
        )
        raise NonFiniteError(
            f"{error}. Network and state of step {progress.step} are saved ({kept}): {site.again} goes on from "
            f"there{back}"
        ) from error


@contextlib.contextmanager
def _explained(site: Site, trainer: Trainer, conduct: Conduct | None, moment: Moment | None = None) -> Iterator[None]:
    """Running out of memory inside the block says at which moment, and what to turn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(site, trainer, conduct, error, moment) from error


def _out_of_memory(
    site: Site, trainer: Trainer, conduct: Conduct | None, error: BaseException, moment: Moment | None = None
) -> OutOfMemory:
    """The message, after saving the state if the weights are whole. moment: the present batch if not given."""
    trainer.trained.optimizer.zero_grad()
    if site.device.type == "cuda":
        torch.cuda.empty_cache()
    kept = ""
    if conduct is not None and not trainer.stepping and trainer.trained.progress.step > 0:
        kept = f" The state is saved ({conduct.keeper.interrupted()}): {site.again} goes on from it."
    moment = moment or Moment(f"a batch of {trainer.bucket[0]} x {trainer.bucket[1]} pixels")
    record = site.output.record() if site.output is not None else None
    begun = trainer.trained.progress.step > 0 or (record is not None and record.begun)
    return OutOfMemory(advice(error, moment, site.run.memory, site.run.cache, site.device, begun) + kept)


def _finish(site: Site, conduct: Conduct, finished: bool, destination: Destination | None) -> None:
    assert site.output is not None
    conduct.finish()
    conduct.close("finished" if finished else "finished early")
    record = site.output.record()
    assert record is not None
    progress = conduct.trained.progress
    patience = None if finished else site.run.validation.early_stop_patience
    site.output.write_record(
        replace(
            record, finished_steps=progress.step, finished_epochs=progress.epoch, begun=True, stopped_early=patience
        )
    )
    network = site.start.folder / f"{site.run.saving.output_name}.safetensors"
    log.info("finished after %d steps: %s", progress.step, network)
    if site.run.command.fresh:
        log.info("influx_infer.py --config_file %s uses it", site.start.folder / CONFIG_FILE)
    if destination is not None:
        publish(destination, conduct, conduct.keeper.describe())
