"""The ready configurations, counted byte by byte at full size, hold the memory model to account."""

import json
from dataclasses import replace

import pytest

from benchmarks import plan
from library.config import load
from library.config.run import Run
from library.models import cost
from library.models.cost import GB
from library.models.shape import FluxShape

FULL = FluxShape()
SHALLOW = FluxShape(double_blocks=1, single_blocks=2)
NAMES = [path.stem for path in plan.examples()]
CARDS = {"4gb": 4, "6gb": 6, "8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24}


def run_of(name: str) -> Run:
    return load(["--config_file", str(plan.ROOT / "config_examples" / f"{name}.toml")], "train")


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict]:
    return {entry["config"]: entry for entry in json.loads(plan.RECORD.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", NAMES)
def test_the_record_is_of_this_configuration(recorded, name) -> None:
    again = plan.described(run_of(name), FULL)
    assert {key: recorded[name][key] for key in again} == again, "run `python -m benchmarks.plan` again"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_fits_the_card(recorded, name) -> None:
    card = next(size for suffix, size in CARDS.items() if f"_{suffix}" in name)
    assert plan.Counted(**recorded[name]["counted"]).total + cost.CUDA_CONTEXT <= 0.9 * card * GB


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_model_never_promises_too_little(recorded, name) -> None:
    counted = plan.Counted(**recorded[name]["counted"]).total
    assert sum(plan.forecast(run_of(name), FULL).values()) >= (1 - plan.TOLERANCE / 2) * counted


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_model_is_close(recorded, name) -> None:
    counted = plan.Counted(**recorded[name]["counted"]).total
    assert sum(plan.forecast(run_of(name), FULL).values()) == pytest.approx(counted, rel=plan.TOLERANCE)


@pytest.fixture(scope="module")
def shallow() -> dict[str, plan.Counted]:
    run = run_of("fill_edit_4gb")
    kept = run.model_copy(update={"memory": run.memory.model_copy(update={"cpu_offload_checkpointing": False})})
    resident = run.model_copy(
        update={"memory": kept.memory.model_copy(update={"blocks_to_swap": 0, "modulation_on_cpu": False})}
    )
    runs = {"all in RAM": run, "checkpoints kept": kept, "resident": resident}
    return {name: plan.count(one, SHALLOW) for name, one in runs.items()}


def test_what_lives_in_ram_is_left_out(shallow) -> None:
    base = cost.weights(SHALLOW, cost.Setting("int8"))
    assert shallow["resident"].weights == pytest.approx(base.total, rel=1e-3) and shallow["resident"].ring == 0
    away, vectors = shallow["checkpoints kept"], base.total - sum(base.blocks) - base.modulation
    assert 0 < away.weights < vectors and away.ring == pytest.approx(2 * max(base.blocks), rel=0.01)
    assert shallow["all in RAM"].dynamic < away.dynamic


def test_the_total_is_of_one_moment(shallow) -> None:
    one = shallow["all in RAM"]
    assert one.activations < one.dynamic < one.activations + one.gradients
    assert one.total == one.weights + one.ring + one.network + one.optimizer + one.dynamic
    assert replace(one, dynamic=0).total == one.total - one.dynamic + one.gradients


def test_small_states_stay_in_full_precision() -> None:
    work = plan.work_of(run_of("fill_edit_4gb"), FULL)
    assert plan.state_bytes([4095], work) == 8 * 4095
    assert plan.state_bytes([8192], work) == 2 * (8192 + 4 * 32)
    assert plan.state_bytes([8192], replace(work, optimizer_offload=True)) == 0


def test_the_table_shows_both_sides(shallow) -> None:
    run = run_of("fill_edit_4gb")
    one = plan.Compared("x", **plan.described(run, FULL), counted=shallow["resident"], forecast={"network": 2e9})
    assert "| x |" in plan.table([one]) and "/ 2.000" in plan.table([one])


@pytest.mark.slow
def test_counting_gives_the_record(recorded) -> None:
    assert plan.count(run_of("fill_edit_4gb"), FULL) == plan.Counted(**recorded["fill_edit_4gb"]["counted"])
