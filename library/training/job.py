"""The training job from a valid configuration to a finished network, in the order in which things can go wrong.

What the user gave is checked first, then the output folder and the cache; weights come last.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from library.config import resolved
from library.config.run import Run
from library.data.cached import CachedDataset, open_cache
from library.errors import OutOfMemory, Stopped
from library.models import setup
from library.models.base import Base
from library.networks.metadata import now
from library.training import assemble, processes, rates, signals, start, trackers
from library.training.conduct import Conduct
from library.training.description import describe_run, file_dtype
from library.training.facts import bucket_counts, dataset_facts
from library.training.keeper import Keeper
from library.training.logbook import Logbook
from library.training.loop import Trained, Trainer
from library.training.objective import Objective
from library.training.optimizers import OptimizerChoice
from library.training.out_of_memory import advice, is_out_of_memory
from library.training.prediction import Predictor
from library.training.processes import World
from library.training.run_folder import RunFolder, fresh_folder
from library.training.signals import StopRequests
from library.training.start import Start
from library.training.validation import measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """Where a run happens: the processes and device, its data, its base, and (on the main process) its folder."""

    run: Run
    world: World
    device: torch.device
    dataset: CachedDataset
    base: Base
    start: Start
    output: RunFolder | None
    stop: StopRequests
    mixed: str


def train(run: Run) -> int:
    """Train. Returns the exit code."""
    choice = rates.choose_optimizer(run.optimizer)
    trackers.wanted(run.logging.report_to)
    assemble.schedule_arguments(run.optimizer)
    world = processes.world_from_environment(run.training.local_rank)
    device = processes.choose_device(run.training.device, world)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.training.allow_tf32
    if signals.was_launched():
        signals.die_with_parent()
    processes.join(world, device)
    try:
        with _site(run, world, device) as site:
            if site.start.done:
                log.info("%s", site.start.done)
                return 0
            return _train(site, choice)
    finally:
        processes.leave(world)


@contextlib.contextmanager
def _site(run: Run, world: World, device: torch.device) -> Iterator[Site]:
    folder = processes.from_main(_folder(run), world)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(RunFolder(folder, run.saving.output_name)) if world.is_main else None
        dataset = open_cache(run)
        stack.callback(dataset.close)
        base = Base.open(run.model)
        begun = start.decide(run, output, dataset, base) if output is not None else None
        begun = processes.from_main(begun, world)
        stop = stack.enter_context(StopRequests(folder))
        mixed = assemble.precision(run.training, device)
        yield Site(run, world, device, dataset, base, begun, output, stop, mixed)


def _folder(run: Run) -> Path:
    return fresh_folder(run.saving.output_dir, run.saving.output_name) if run.command.fresh else run.saving.output_dir


def _train(site: Site, choice: OptimizerChoice) -> int:
    run, saved = site.run, site.start.saved()
    transformer = setup.load(site.base.transformer_file, site.device, assemble.DTYPES[site.mixed], run.memory)
    setup.set_up_training(transformer, run.memory)
    trained = assemble.make_trained(run, choice, transformer, site.world, site.mixed, site.start.seed, saved)
    data = assemble.make_data(
        site.dataset, site.world, trained.progress, site.start.seed, saved, run.training.dataloader_num_workers
    )
    num_steps = assemble.num_steps(run.training, data, trained.progress)
    schedule = assemble.make_schedule(run.optimizer, num_steps)
    trainer = Trainer(
        trained, data, Predictor(transformer), Objective(run.training, site.start.seed), schedule, run.training,
        run.optimizer, site.world, site.device, run.network.scale_weight_norms,
    )  # fmt: skip
    conduct = _conduct(site, trainer) if site.output is not None else None
    try:
        finished = _steps(site, trainer, conduct)
    except BaseException as error:
        if conduct is not None:
            conduct.close(f"stopped ({type(error).__name__})")
        raise
    if conduct is not None:
        _finish(site, trained, conduct, finished)
    processes.wait_for_all(site.world)
    return 0


def _steps(site: Site, trainer: Trainer, conduct: Conduct | None) -> bool:
    """Run to the last step; returns False if it ended early on purpose. Raises Stopped, NonFiniteError, OutOfMemory."""
    if conduct is not None:
        conduct.begin()
    steps = trainer.steps()
    while True:
        try:
            result = next(steps, None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(site, trainer, conduct, error) from error
        if result is None:
            return True
        early = conduct.after_step(result) if conduct is not None else False
        code, early = _agree(site, early)
        if code and trainer.trained.progress.step < trainer.schedule.num_steps:
            raise _stopped(site, conduct, code)
        if early:
            return False


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
        return Stopped("stopped, as the main process was asked to", code)
    saved = conduct.keeper.interrupted()
    reason = site.stop.reason or "a signal"
    step = conduct.trained.progress.step
    return Stopped(
        f"stopped by {reason} after step {step} of {conduct.num_steps}. Network and state are saved ({saved}). "
        "Run the same command again to continue",
        code,
    )


def _out_of_memory(site: Site, trainer: Trainer, conduct: Conduct | None, error: BaseException) -> OutOfMemory:
    """The message, after saving the state if the weights are whole."""
    trainer.trained.optimizer.zero_grad()
    if site.device.type == "cuda":
        torch.cuda.empty_cache()
    kept = ""
    if conduct is not None and not trainer.stepping:
        kept = f" The state is saved ({conduct.keeper.interrupted()})."
    return OutOfMemory(advice(error, trainer.bucket, site.run.memory, site.device) + kept)


def _conduct(site: Site, trainer: Trainer) -> Conduct:
    run, folder, trained = site.run, site.start.folder, trainer.trained
    buckets = bucket_counts(site.dataset)
    largest = max(buckets, key=lambda size: size[0] * size[1])

    describe = partial(
        describe_run, run, site.base, trained.network, trained.progress, site.start.seed, len(site.dataset.items),
        now(), largest,
    )  # fmt: skip
    keeper = Keeper(
        run.saving, folder, trained, file_dtype(run, site.mixed), site.start.seed, site.start.identity, describe,
        lambda: trainer.data.epochs.segments(trained.progress.epoch, trained.progress.position),
    )  # fmt: skip
    settings = {setting.place: str(setting.value) for setting in resolved.changed(run)}
    opened = trackers.build(run.logging, folder, run.saving.output_name, settings, trained.progress.step)
    num_steps = trainer.schedule.num_steps
    logbook = Logbook(folder, opened, run.logging.log_every_n_steps, trained.progress.step, num_steps)
    facts = dataset_facts(site.dataset, buckets)
    held_out = partial(_measure, site, trainer) if site.dataset.held_out_items else None
    return Conduct(run, folder, trained, keeper, logbook, num_steps, facts, None, held_out)


def _measure(site: Site, trainer: Trainer) -> dict[str, float]:
    table = site.run.validation
    batches = site.dataset.held_out_batches(table.max_validation_steps)
    guidance = site.run.training.guidance_scale
    return measure(trainer.predict, batches, table.validation_timesteps, site.start.seed, guidance, site.device)


def _finish(site: Site, trained: Trained, conduct: Conduct, finished: bool) -> None:
    assert site.output is not None
    conduct.finish()
    conduct.close("finished" if finished else "finished early")
    record = site.output.record()
    assert record is not None
    steps, epochs = trained.progress.step, trained.progress.epoch
    site.output.write_record(replace(record, finished_steps=steps, finished_epochs=epochs))
    log.info("finished after %d steps: %s", steps, site.start.folder / f"{site.run.saving.output_name}.safetensors")
