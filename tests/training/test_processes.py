"""Two processes are one with twice the batch; they can be killed, stopped, and continued by another number of them."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training import state
from tests.training import forked
from tests.training.project import Project

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"max_train_steps": 5, "save_state_on_train_end": True, "save_every_n_steps": 2}


def free_port() -> int:
    """A port nobody listens on, below those that the system gives to outgoing connections of its own accord."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def processes(count: int, job: Callable[[], int]) -> list[int]:
    """Start `count` forked processes that know each other; returns their ids."""
    port = str(free_port())

    def named(rank: int) -> Callable[[], int]:
        def work() -> int:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            return job()

        return work

    return [forked.start(named(rank)) for rank in range(count)]


def train_on(count: int, project: Project, output: Path, **options: object) -> list[int]:
    """Exit codes of a run on `count` processes."""
    children = processes(count, lambda: project.train(output_dir=output, **options))
    return [forked.wait(child) for child in children]


def networks_agree(a: Path, b: Path, tolerance: float) -> None:
    """Two networks are equal to float tolerance."""
    one, two = load_file(a / "net.safetensors"), load_file(b / "net.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "stratified_timesteps": True}])
def test_two_processes_equal_one_with_twice_the_batch(cached, tmp_path, monkeypatch, options):
    """To float tolerance: gradients are summed in another order."""
    assert train_on(2, cached, tmp_path / "two", **OPTIONS, **options) == [0, 0]
    monkeypatch.setattr("tests.training.project.DATASET", _with_batch(4))
    assert cached.train(output_dir=tmp_path / "one", **OPTIONS, **options) == 0
    networks_agree(tmp_path / "two", tmp_path / "one", 1e-5)
    scalars = [state.read_scalars(tmp_path / name / "net-state") for name in ("two", "one")]
    assert scalars[0]["segments"][-1][0] == 2
    assert scalars[0]["progress"]["micro_step"] == scalars[1]["progress"]["micro_step"]


def _with_batch(size: int) -> str:
    from tests.training.project import DATASET

    return DATASET.replace("{batch}", str(size))


def test_kill_one_of_two_and_continue(cached, tmp_path):
    """The run is bit for bit what it would have been."""
    options = {**OPTIONS, "max_train_steps": 12}
    assert train_on(2, cached, tmp_path / "whole", **options) == [0, 0]
    out = tmp_path / "out"
    children = processes(2, lambda: cached.train(output_dir=out, **{**options, "max_train_steps": 3000}))
    forked.until(lambda: (out / "net-step00000004-state").exists(), children[0])
    for child in children:
        os.kill(child, signal.SIGKILL)
        forked.wait(child)
    for path in out.glob("net-step*-state"):  # whatever came after step 4, so that both runs end at step 12
        if int(path.name[8:16]) > 12:
            shutil.rmtree(path)
    assert train_on(2, cached, out, **options) == [0, 0]
    networks_agree(out, tmp_path / "whole", 0)


def test_a_signal_to_one_stops_all_at_the_same_step(cached, tmp_path):
    """Any process may be the one that is told."""
    out = tmp_path / "out"
    children = processes(2, lambda: cached.train(output_dir=out, **{**OPTIONS, "max_train_steps": 3000}))
    forked.until(lambda: forked.steps_done(out) >= 2, children[0])
    os.kill(children[1], signal.SIGTERM)
    assert [forked.wait(child) for child in children] == [143, 143]
    assert len([path for path in out.glob("net-step*-state")]) >= 1


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_continuing_on_another_number_of_processes(cached, tmp_path, first, then):
    """The rest of the epoch is cut anew: every item of it comes once."""
    out = tmp_path / "out"
    assert train_on(first, cached, out, **{**OPTIONS, "max_train_steps": 1}) == [0] * first
    assert train_on(then, cached, out, **{**OPTIONS, "max_train_steps": 4}) == [0] * then
    scalars = state.read_scalars(out / "net-state")
    assert scalars["step"] == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_refusal_of_the_main_process_ends_all_in_good_order(project, tmp_path):
    """Only the main one looks at the folder: the other ends with the same code, and without a traceback."""
    assert project.train(output_dir=tmp_path / "out", max_train_steps=1) == 0
    assert train_on(2, project, tmp_path / "out", max_train_steps=1, network_dim=8) == [2, 2]
    (tmp_path / "blocked").write_text("")
    assert train_on(2, project, tmp_path / "blocked/out", max_train_steps=1) == [5, 5]


def test_torchrun_starts_the_real_command(cached, tmp_path):
    """Two processes under torchrun: a world of two, both at work."""
    words = cached.words("x", output_dir=tmp_path / "out", **OPTIONS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, str(ROOT / "influx_train.py"), *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    scalars = state.read_scalars(tmp_path / "out/net-state")
    assert scalars["segments"][-1][0] == 2
    assert train_on(2, cached, tmp_path / "forked", **OPTIONS) == [0, 0]
    networks_agree(tmp_path / "out", tmp_path / "forked", 1e-6)


def test_a_trainer_whose_launcher_dies_stops_and_saves(cached, tmp_path):
    """accelerate launch passes no signal on; the kernel tells the trainer instead."""
    out = tmp_path / "out"

    def launcher() -> int:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        trainer = os.fork()
        if trainer == 0:
            os._exit(cached.train(output_dir=out, **{**OPTIONS, "max_train_steps": 3000}))
        time.sleep(600)
        return 0

    child = forked.start(launcher)
    forked.until(lambda: forked.steps_done(out) >= 2, child)
    os.kill(child, signal.SIGKILL)
    forked.wait(child)
    deadline = time.monotonic() + 60
    while (out / ".influx.owner.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(FileNotFoundError):
        pytest.fail(f"still at work: {(out / '.influx.owner.json').read_text()}")
    assert list(out.glob("net-step*-state"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_split_over_processes_trains_alike(cached, tmp_path, monkeypatch, checkpointing):
    """FSDP2 through fully_shard: the same network as with the whole base on every process."""
    options = {**OPTIONS, "gradient_checkpointing": checkpointing}
    assert train_on(2, cached, tmp_path / "whole", **options) == [0, 0]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train_on(2, cached, tmp_path / "split", **options) == [0, 0]
    networks_agree(tmp_path / "split", tmp_path / "whole", 1e-6)
    if not checkpointing:  # what cannot be split is refused, so the base above was split
        assert train_on(2, cached, tmp_path / "quantised", base_precision="int8", **options) == [2, 2]


def test_streaming_works_in_every_process(cached, tmp_path):
    """Each process streams its own copy of the base: not a bit of the network changes."""
    streamed = {"blocks_to_swap": "all", "gradient_checkpointing": True, "cpu_offload_checkpointing": True}
    assert train_on(2, cached, tmp_path / "resident", **OPTIONS) == [0, 0]
    assert train_on(2, cached, tmp_path / "streamed", **OPTIONS, **streamed) == [0, 0]
    networks_agree(tmp_path / "streamed", tmp_path / "resident", 0)


def test_each_process_keeps_its_share_of_a_split_weight():
    """Half of the bytes, the same products, and gradients for what is trained on top."""

    def job() -> int:
        from torch.distributed.device_mesh import init_device_mesh

        from library.memory.linear import Linear
        from library.training import processes as many
        from library.training.sharding import ShardedStorage

        world = many.world_from_environment()
        many.join(world, torch.device("cpu"))
        torch.manual_seed(0)
        linear, x = Linear(16, 32), torch.randn(3, 16, requires_grad=True)
        expected = linear(x)
        (slope,) = torch.autograd.grad(expected.square().sum(), x)
        linear.set_storage(ShardedStorage(linear.weight, init_device_mesh("cpu", (2,))))
        assert linear.storage.num_bytes == 32 * 16 * 4 // 2
        found = linear(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], slope)
        assert linear.dequantized().shape == (32, 16)
        many.leave(world)
        return 0

    assert [forked.wait(child) for child in processes(2, job)] == [0, 0]
