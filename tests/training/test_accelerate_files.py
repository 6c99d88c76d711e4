"""The shipped launcher configurations are what accelerate understands, and the trainer reads what it would set."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from library.training.processes import sharding_wanted, world_from_environment

FOLDER = Path(__file__).resolve().parents[2] / "config_examples" / "accelerate"
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
