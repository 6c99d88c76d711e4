"""State folders: whole or not there, damage found, the newest whole one used."""

import os

import pytest
import torch

from library.training import state
from library.training.state import RunState, StateError, newest, optimizer_states, optimizer_tensors


def example(step: int, name: str = "run") -> RunState:
    """A state that can be told apart."""
    return RunState({"network": {"a": torch.full((4,), float(step))}}, {"step": step, "output_name": name})


def test_everything_comes_back(tmp_path):
    """Tensors of every kind, nested scalars, integer keys, tuples, infinities."""
    original = [
        {
            "state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, 3, dtype=torch.bfloat16), "k": 7}},
            "param_groups": [{"betas": (0.9, 0.99), "params": [0, 1], "growth": float("inf"), "beta3": None}],
        }
    ]
    tensors, skeleton = optimizer_tensors(original)
    state.save(tmp_path / "a-state", RunState({"optimizer": tensors}, {"skeleton": skeleton}))
    loaded = state.load(tmp_path / "a-state")
    restored = optimizer_states(loaded.tensors["optimizer"], loaded.scalars["skeleton"])
    assert restored[0]["param_groups"] == original[0]["param_groups"]
    assert restored[0]["state"][0]["k"] == 7
    for key in ("step", "m"):
        assert torch.equal(restored[0]["state"][0][key], original[0]["state"][0][key])
        assert restored[0]["state"][0][key].dtype == original[0]["state"][0][key].dtype


def test_what_json_cannot_hold_is_refused():
    """No pickle by the back door."""
    with pytest.raises(TypeError, match="without pickle"):
        optimizer_tensors([{"state": {0: {"f": open}}}])


def test_saving_again_replaces(tmp_path):
    """The same name twice: the second is there, and nothing else."""
    folder = tmp_path / "run-state"
    state.save(folder, example(1))
    state.save(folder, example(2))
    assert state.load(folder).scalars["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run-state"]


def test_newest_whole_state_is_found(tmp_path):
    """By step, of this run's name only."""
    state.save(tmp_path / "run-step00000010-state", example(10))
    state.save(tmp_path / "run-step00000020-state", example(20))
    state.save(tmp_path / "other-step00000030-state", example(30, "other"))
    assert newest(tmp_path, "run") == (tmp_path / "run-step00000020-state", [])
    assert newest(tmp_path, "nobody") == (None, [])


@pytest.mark.parametrize("victim", ["manifest.json", "state.json", "network.safetensors"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "empty"])
def test_damage_is_found_and_the_previous_state_used(tmp_path, victim, damage):
    """Every file, every kind of damage: one message, the older state."""
    older, damaged = tmp_path / "run-step00000010-state", tmp_path / "run-step00000020-state"
    state.save(older, example(10))
    state.save(damaged, example(20))
    path = damaged / victim
    content = bytearray(path.read_bytes())
    if damage == "delete":
        os.remove(path)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(b"")
    found, troubles = newest(tmp_path, "run")
    assert found == older
    assert len(troubles) == 1
    assert str(damaged) in troubles[0]
    with pytest.raises(StateError):
        state.load(damaged)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path, mask):
    """Others may read a state where they may read the network."""
    before = os.umask(mask)
    try:
        state.save(tmp_path / "run-state", example(1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run-state").iterdir()}
    assert len(modes) >= 3 and set(modes.values()) == {0o666 & ~mask}


def test_a_kill_inside_saving_leaves_the_old_or_the_new_state(tmp_path):
    """The process dies at every call that touches the disk in turn; a whole state is always found."""
    calls = ("fsync", "rename", "chmod", "replace", "mkdir")
    folder = tmp_path / "run-state"
    died = 0
    for countdown in range(40):
        state.save(folder, example(1))
        child = os.fork()
        if child == 0:
            _die_at(calls, countdown)
            state.save(folder, example(2))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found, _ = newest(tmp_path, "run")
        assert found is not None, f"no state after dying at call {countdown}"
        assert state.load(found).scalars["step"] in (1, 2)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        died += 1
    assert died >= 8, "the process was meant to die at several points"


def _die_at(calls: tuple[str, ...], countdown: int) -> None:
    left = [countdown]

    def counted(original):
        def call(*arguments, **options):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return original(*arguments, **options)

        return call

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
