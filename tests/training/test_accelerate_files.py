"""The shipped launcher configurations are what accelerate understands, and the trainer reads what it would set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from library.training import state
from library.training.processes import sharding_wanted, world_from_environment
from tests.training.test_processes import free_port

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "config_examples" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(file):
    """Every key is known, and says which kind of launch it is."""
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deep": "DEEPSPEED"}
    assert config.distributed_type == kinds[next(name for name in kinds if file.stem.startswith(name))]
    assert config.num_processes >= 2
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_five_files_are_shipped():
    """Data parallel on one and two machines, FSDP2, ZeRO 2 and 3."""
    assert [file.stem for file in FILES] == ["ddp", "ddp_two_machines", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize(
    ("variables", "split"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
    ],
)
def test_what_the_launcher_asks_for(monkeypatch, variables, split):
    """FSDP and ZeRO stage 3 split the base."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sharding_wanted() is split


def test_local_rank_fills_the_environment(monkeypatch):
    """For launchers that give it as an option."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    assert world_from_environment(3).local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_from_environment(3).local_rank == 1


@pytest.mark.slow
def test_the_documented_launch_trains_on_two_processes(project, tmp_path):
    """ddp.yaml by `accelerate launch`, here on two CPU processes: both worked, one wrote."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    words = project.words("out", save_state_on_train_end=True, max_train_steps=2)
    done = subprocess.run(
        [*launcher, "--config_file", str(FOLDER / "ddp.yaml"), str(ROOT / "influx_train.py"), *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/net.safetensors").is_file()
    scalars = state.read_scalars(tmp_path / "out/net-state")
    assert scalars["segments"][-1][0] == 2, "the epoch was cut for two processes"
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2
