"""The training job from a valid configuration to a finished network, in the order in which things can go wrong.

What the user gave is checked first, then the output folder and the cache; weights come last.
"""

import logging
from dataclasses import replace

import torch

from library.config.run import Run
from library.errors import OutOfMemory, Stopped
from library.memory.device import choose_device
from library.models import setup
from library.models.base import Base
from library.models.probe import probe_step
from library.training import assemble, hub, processes, rates, signals, trackers
from library.training.conduct import Conduct
from library.training.equipment import equip
from library.training.loop import Trainer
from library.training.objective import Objective
from library.training.optimizers import OptimizerChoice
from library.training.out_of_memory import advice, is_out_of_memory
from library.training.outlook import outlook
from library.training.prediction import Predictor
from library.training.publish import publish
from library.training.site import Site, opened

log = logging.getLogger(__name__)


def train(run: Run) -> int:
    """Train. Returns the exit code."""
    choice = rates.choose_optimizer(run.optimizer)
    trackers.wanted(run.logging.report_to)
    assemble.schedule_arguments(run.optimizer)
    hub.check(run.saving, run.saving.output_dir)
    outlook(run, Base.open(run.model))
    world = processes.world_from_environment(run.training.local_rank)
    device = choose_device(run.training.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.training.allow_tf32
    if signals.was_launched():
        signals.die_with_parent()
    processes.join(world, device)
    try:
        with opened(run, world, device) as site:
            if site.start.done:
                log.info("%s", site.start.done)
                return 0
            return _train(site, choice)
    finally:
        processes.leave(world)


def _train(site: Site, choice: OptimizerChoice) -> int:
    run, saved = site.run, site.start.saved()
    transformer = setup.load(site.base.transformer_file, site.device, assemble.DTYPES[site.mixed], run.memory)
    setup.set_up_training(transformer, run.memory)
    clip = site.base.load_clip(site.device, assemble.DTYPES[site.mixed]) if run.network.train_text_encoder else None
    trained = assemble.make_trained(run, choice, transformer, clip, site.world, site.mixed, site.start.seed, saved)
    if site.sharded:
        from library.training.sharding import shard_blocks

        shard_blocks(transformer, site.world, site.device)
    data = assemble.make_data(
        site.dataset, site.world, trained.progress, site.start.seed, saved, run.training.dataloader_num_workers
    )
    schedule = assemble.make_schedule(run.optimizer, assemble.num_steps(run.training, data, trained.progress))
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
            conduct.close(f"stopped ({type(error).__name__})")
        raise
    if conduct is not None:
        _finish(site, conduct, finished)
    processes.wait_for_all(site.world)
    return 0


def _steps(site: Site, trainer: Trainer, conduct: Conduct | None) -> bool:
    """Run to the last step; returns False if it ended early on purpose. Raises Stopped, NonFiniteError, OutOfMemory."""
    if conduct is not None:
        conduct.begin()
    _probe(site, trainer, conduct)
    steps, begun = trainer.steps(), False
    while True:
        try:
            result = next(steps, None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(site, trainer, conduct, error) from error
        if result is None:
            return True
        if site.output is not None and not begun:
            site.output.has_begun()
        begun = True
        early = conduct.after_step(result) if conduct is not None else False
        code, early = _agree(site, early)
        if code and trainer.trained.progress.step < trainer.schedule.num_steps:
            raise _stopped(site, conduct, code)
        if early:
            return False


def _probe(site: Site, trainer: Trainer, conduct: Conduct | None) -> None:
    """Run the largest batch once, on zeros, so that a card that is too small shows before the first step."""
    if not site.run.memory.memory_probe or site.device.type != "cuda":
        return
    members = site.dataset.listing.members
    sizes = [(size, member.batch_size) for member in members for size in member.group[1]]
    trainer.bucket, batch = max(sizes, key=lambda size: size[0][0] * size[0][1] * size[1])
    length = site.run.cache.t5xxl_max_token_length or site.base.defaults.t5xxl_max_token_length
    try:
        peak = probe_step(trainer.predict.transformer, *trainer.bucket, batch, length)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(site, trainer, conduct, error) from error
    width, height = trainer.bucket
    log.info("the largest batch (%d x %d x %d pixels) fits: %.1f GB reserved", batch, width, height, peak)


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
        "Run the same command again to continue",
        code,
    )


def _out_of_memory(site: Site, trainer: Trainer, conduct: Conduct | None, error: BaseException) -> OutOfMemory:
    """The message, after saving the state if the weights are whole."""
    trainer.trained.optimizer.zero_grad()
    if site.device.type == "cuda":
        torch.cuda.empty_cache()
    kept = ""
    if conduct is not None and not trainer.stepping and trainer.trained.progress.step > 0:
        kept = f" The state is saved ({conduct.keeper.interrupted()})."
    return OutOfMemory(advice(error, trainer.bucket, site.run.memory, site.device) + kept)


def _finish(site: Site, conduct: Conduct, finished: bool) -> None:
    assert site.output is not None
    conduct.finish()
    conduct.close("finished" if finished else "finished early")
    record = site.output.record()
    assert record is not None
    progress = conduct.trained.progress
    finished_at = {"finished_steps": progress.step, "finished_epochs": progress.epoch, "begun": True}
    site.output.write_record(replace(record, **finished_at))
    log.info(
        "finished after %d steps: %s", progress.step, site.start.folder / f"{site.run.saving.output_name}.safetensors"
    )
    address = hub.check(site.run.saving, site.start.folder)
    if address is not None:
        publish(address, conduct, conduct.keeper.describe())
