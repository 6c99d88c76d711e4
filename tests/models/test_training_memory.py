"""The whole training command under each way to keep the base: the trained file does not depend on it."""

import pytest

from benchmarks.step import Size, prepare
from influx_train import job
from library.start import run_command
from library.tensorfile import data_hash

SIZE = Size(heads=2, head_dim=16, double=1, single=2, pixels=64, text=32)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    prepare(folder, SIZE)
    return folder


def trained(project, name: str, *keys: str) -> str:
    argv = ["--config_file", str(project / "config.toml"), "--max_train_steps", "3", "--output_name", name]
    argv += ["--output_dir", str(project / name), "--dataset_cache_dir", str(project / "output" / "dataset_cache")]
    assert run_command("train", job, [*argv, *keys]) == 0
    return data_hash(project / name / f"{name}.safetensors")


def test_streaming_checkpointing_and_offload_change_no_byte(project) -> None:
    plain = trained(project, "plain", "--gradient_checkpointing", "false")
    assert trained(project, "checkpointed") == plain
    streamed = ["--blocks_to_swap", "all", "--cpu_offload_checkpointing", "--modulation_on_cpu", "--optimizer_offload"]
    assert trained(project, "streamed", *streamed) == plain
    assert trained(project, "attention", "--save_attention_outputs") == plain


def test_a_quantised_base_trains_the_same_from_its_saved_form(project) -> None:
    keys = ["--base_precision", "int8", "--save_quantized_base", str(project / "int8_base")]
    first = trained(project, "first", *keys)
    assert (project / "int8_base" / "quantized.json").is_file()
    assert trained(project, "again", *keys, "--blocks_to_swap", "2") == first
    assert first != trained(project, "exact")


def test_a_budget_chooses_and_trains(project, capsys) -> None:
    trained(project, "budget", "--vram_budget_gb", "4")
    assert "chosen for vram_budget_gb = 4" in capsys.readouterr().out
