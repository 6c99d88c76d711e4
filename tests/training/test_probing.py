"""What a run tries out before its first step, called on a CPU: nothing of what is trained depends on it."""

from types import SimpleNamespace

import pytest
import torch

from library.config.tables import CacheTable, MemoryTable
from library.errors import OutOfMemory
from library.models import cost, probe
from library.tensorfile import data_hash
from library.training import job, probing
from library.training.out_of_memory import Moment, advice
from tests.training.project import make_project
from tests.training.test_processes import train_on

PREVIEWED = {"validation_prompt": "make it red", "sample_steps": 1, "max_train_steps": 2}
WAYS = {
    "plain": {},
    "streamed": {
        "blocks_to_swap": "all", "gradient_checkpointing": True, "cpu_offload_checkpointing": True,
        "modulation_on_cpu": True, "optimizer_offload": True,
    },
    "accumulated": {"gradient_accumulation_steps": 2, "network_dropout": 0.2, "use_ema": True},
    "text": {"train_text_encoder": True, "optimizer_type": "Prodigy", "learning_rate": 1.0},
    "resting": {"optimizer_type": "AdamWScheduleFree", "network_dropout": 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_slow_collection(monkeypatch):
    """Going through the heap of a test process takes longer than all these runs do."""
    monkeypatch.setattr("library.memory.device.gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("probing"), held_out=0.3, settings=PREVIEWED)


def attempt_all(tried: list[str], places: list | None = None):
    """The job's probe as it is on a GPU, but for the numbers that only a GPU has."""

    def run(site, trainer, conduct) -> None:
        every = probing.Probe(site, trainer, conduct.painter if conduct is not None else None)
        for attempt in every.attempts():
            attempt.run()
            tried.append(attempt.moment.words)
        if places is not None:
            places.extend([sum(tensor.nbytes for tensor in every.held), trainer])
        every.close()
        assert not every.held

    return run


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_with_and_without(project, monkeypatch, way) -> None:
    """The same bytes: no draw, no order, no weight, no state is touched."""
    keys = {**WAYS[way], "validation_generate": 1}
    assert project.train(f"{way}_without", **keys) == 0
    tried: list[str] = []
    monkeypatch.setattr(job, "_probe", attempt_all(tried))
    assert project.train(f"{way}_with", **keys) == 0
    assert project.trained(f"{way}_with") == project.trained(f"{way}_without")
    assert tried == [
        "the optimizer's state", "a batch of 2 x 64 x 64 pixels", "a preview of 1 x 64 x 64 pixels",
        "a preview, the VAE decoding 64 x 64 pixels", "held-out items of 2 x 64 x 64 pixels",
        "held-out items, the VAE decoding 64 x 64 pixels",
    ]  # fmt: skip


def test_it_holds_the_state_that_the_first_step_will_allocate(project, monkeypatch) -> None:
    for name, bytes_each in (("AdamW", 8), ("Prodigy", 16)):
        seen: list = []
        monkeypatch.setattr(job, "_probe", attempt_all([], seen))
        assert project.train(f"held_{name}", optimizer_type=name) == 0
        held, trainer = seen
        assert held == bytes_each * sum(parameter.numel() for parameter in trainer.parameters)
        there = sum(
            value.nbytes
            for optimizer in trainer.trained.optimizer.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        assert 0.8 * held < there < 1.05 * held, "what it really became"
    monkeypatch.setattr(job, "_probe", attempt_all([], seen := []))
    assert project.train("held_AdamW", optimizer_type="AdamW", max_train_steps=4, resume="latest") in (0, 2)
    monkeypatch.setattr(job, "_probe", attempt_all([], seen := []))
    assert project.train("held_offload", optimizer_offload=True) == 0
    assert seen[0] == 0, "between steps it is in RAM"


@pytest.mark.parametrize(
    ("place", "words", "knob"),
    [
        ("library.training.probing.probe_step", "a batch of 2 x 64 x 64 pixels", "gradient_checkpointing = true"),
        ("library.training.probing.hold", "the optimizer's state", "gradient_checkpointing = true"),
        ("library.previews.sample", "a preview of 1 x 64 x 64 pixels", "a smaller picture"),
        ("library.previews.Previews.load_decoder", "the VAE decoding 64 x 64 pixels", "vae_tiling = true"),
    ],
)
def test_what_does_not_fit_is_named_before_the_first_step(project, monkeypatch, capsys, place, words, knob) -> None:
    """The job's own probe, on a device that says it is a GPU."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    def on_a_gpu(site, trainer, conduct) -> None:
        every = probing.Probe(site, trainer, conduct.painter)
        for attempt in every.attempts():
            with job._explained(site, trainer, conduct, attempt.moment):
                attempt.run()

    monkeypatch.setattr(job, "_probe", on_a_gpu)
    monkeypatch.setattr(place, full)
    assert project.train(f"full_{place.rpartition('.')[2]}") == 4
    error = capsys.readouterr().err
    assert words in error and knob in error and "The state is saved" not in error


def test_running_out_between_steps_is_explained_too(project, monkeypatch, capsys) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr("library.previews.Previews.make", full)
    assert project.train("between", sample_every_n_steps=2) == 4
    error = capsys.readouterr().err
    assert "what is made between two steps" in error and "smaller picture" in error and "The state is saved" in error


def test_knobs_that_are_turned_already_are_not_named() -> None:
    error, device = torch.OutOfMemoryError("CUDA out of memory"), torch.device("cpu")
    picture = Moment("a preview", True, True)
    told = advice(error, picture, MemoryTable(), CacheTable(vae_tiling=True), device)
    assert "vae_tiling" not in told and 'vae_dtype = "bf16"' in told and "gradient_checkpointing" not in told
    told = advice(MemoryError(), Moment("a batch"), MemoryTable(gradient_checkpointing=True), CacheTable(), device)
    assert "gradient_checkpointing" not in told and "vae" not in told and 'base_precision = "int8"' in told


def test_a_run_that_has_begun_is_told_what_may_still_change() -> None:
    """Batch, resolution and what the cache is made with bind a run: they are named as parts of a new one."""
    device, error = torch.device("cpu"), torch.OutOfMemoryError("CUDA out of memory")
    spent = MemoryTable(
        gradient_checkpointing=True, cpu_offload_checkpointing=True, blocks_to_swap="all", base_precision="nf4"
    )
    told = advice(error, Moment("a batch"), spent, CacheTable(), device, begun=True)
    assert told.partition("--fresh")[0].count(";") == 1 and "optimizer_offload = true" in told.partition("--fresh")[0]
    assert "new run (--fresh, with network_weights = what this one saved): a smaller train_batch_size" in told
    assert "--fresh" not in advice(error, Moment("a batch"), spent, CacheTable(), device)
    told = advice(error, Moment("a preview", True, True), MemoryTable(), CacheTable(), device, begun=True)
    assert "a smaller picture" in told and "vae_tiling" not in told


def test_the_job_probes_on_a_gpu_and_only_if_asked(monkeypatch) -> None:
    ran = []

    class Recorder:
        def __init__(self, *_):
            ran.append("begun")

        def attempts(self):
            return [probing.Attempt(Moment("a batch"), lambda: ran.append("tried"))]

        def close(self):
            ran.append("closed")

    monkeypatch.setattr(job, "Probe", Recorder)
    for name in ("reset_peak_memory_stats", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 3_500_000_000)
    site = SimpleNamespace(run=SimpleNamespace(memory=MemoryTable()), device=SimpleNamespace(type="cuda"))
    job._probe(site, None, None)
    assert ran == ["begun", "tried", "closed"]

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "attempts", lambda self: [probing.Attempt(Moment("a batch"), full)])
    monkeypatch.setattr(job, "_out_of_memory", lambda *_: OutOfMemory("too small"))
    with pytest.raises(OutOfMemory, match="too small"):
        job._probe(site, None, None)
    assert ran[-1] == "closed"
    count = len(ran)
    site.run.memory = MemoryTable(memory_probe=False)
    job._probe(site, None, None)
    site.run.memory, site.device.type = MemoryTable(), "cpu"
    job._probe(site, None, None)
    assert len(ran) == count


def test_every_built_in_optimizer_has_its_bytes() -> None:
    from library.training.optimizers import BUILT_IN

    assert set(cost.OPTIMIZER_BYTES) == set(BUILT_IN) and set(cost.STEP_BYTES) < set(BUILT_IN)
    assert probe.LATENT_CHANNELS == 16


def test_every_process_tries_its_batch_and_the_main_one_its_pictures(project, monkeypatch, tmp_path) -> None:
    def noting(site, trainer, conduct) -> None:
        tried: list[str] = []
        attempt_all(tried)(site, trainer, conduct)
        (tmp_path / f"rank{site.world.rank}").write_text("\n".join(tried), encoding="utf-8")

    assert train_on(2, project, tmp_path / "without") == [0, 0]
    monkeypatch.setattr(job, "_probe", noting)
    assert train_on(2, project, tmp_path / "with") == [0, 0]
    assert data_hash(tmp_path / "with" / "net.safetensors") == data_hash(tmp_path / "without" / "net.safetensors")
    main, other = ((tmp_path / f"rank{rank}").read_text(encoding="utf-8").splitlines() for rank in (0, 1))
    assert other == main[:2] and main[2].startswith("a preview")
