"""Host memory: the allocators' settings reach torch, and a system that locks no more memory fails nothing."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from library.memory import allocator, host, offload, optimizer_state
from library.memory.host import host_tensor
from library.memory.offload import InHostMemory


def test_settings_by_platform() -> None:
    assert allocator.settings("linux") == "pinned_max_round_threshold_mb:1,expandable_segments:True"
    assert allocator.settings("win32") == "pinned_max_round_threshold_mb:1"


@pytest.mark.parametrize("name", allocator.USERS_OWN)
def test_the_users_own_settings_stay(name) -> None:
    environment = {name: "max_split_size_mb:64"}
    assert not allocator.configure(environment)
    assert environment == {name: "max_split_size_mb:64"}


def test_an_older_torch_is_left_alone() -> None:
    environment: dict[str, str] = {}
    assert not allocator.configure(environment, "2.11.0+cu130") and not environment
    assert allocator.configure(environment, "2.13.1+cu132") and environment == {
        allocator.VARIABLE: allocator.settings()
    }


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in allocator.USERS_OWN}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("order", ["allocator.configure(); import torch", "import torch; allocator.configure()"])
def test_torch_has_the_settings(order) -> None:
    said = run(f"from library.memory import allocator; {order}; print(torch._C._accelerator_getAllocatorSettings())")
    assert said == allocator.settings()


@pytest.mark.parametrize("setting", allocator.settings("linux").split(","))
def test_torch_reads_these_names(setting) -> None:
    # A name that torch does not know is passed over, whatever its value; one that it knows is parsed.
    name = setting.partition(":")[0]
    accept = torch._C._accelerator_setAllocatorSettings
    try:
        accept("pinned_of_another_name:x")
        with pytest.raises(ValueError, match=r"stoull|stoul|True"):
            accept(f"{name}:x")
        accept(setting)
    finally:
        accept("")


def refuse(*_):
    raise RuntimeError("CUDA error: out of memory")


def test_a_refusal_is_said_once_and_fails_nothing(caplog) -> None:
    host._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [host_tensor((3, 4), torch.bfloat16, True, refuse) for _ in range(3)]
    assert all(tensor.shape == (3, 4) and tensor.dtype == torch.bfloat16 for tensor in found)
    assert len(caplog.records) == 1 and "locks no more RAM" in caplog.text


def test_nothing_is_locked_that_was_not_asked_for(caplog) -> None:
    host._say_once.cache_clear()
    assert host_tensor((2,), torch.uint8, False, refuse).numel() == 2
    assert host_tensor((2,), torch.uint8, True).numel() == 2  # without a GPU there is nothing to lock for
    assert not caplog.records


def test_activations_ask_once_and_go_on(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        offload, "host_tensor", lambda shape, dtype, pin: asked.append(pin) or host_tensor(shape, dtype, pin, refuse)
    )
    keeper = InHostMemory(torch.device("cpu"), large=1)
    keeper.pin = True
    first, second = keeper._host_tensor(torch.zeros(4)), keeper._host_tensor(torch.zeros(5))
    assert (first.shape, second.shape, asked) == ((4,), (5,), [True, False])


def test_optimizer_state_asks_the_same_function(monkeypatch) -> None:
    asked = []

    def answer(shape, dtype, pin):
        asked.append((shape, dtype, pin))
        return host_tensor(shape, dtype, pin, refuse)

    monkeypatch.setattr(optimizer_state, "host_tensor", answer)
    on_a_card = SimpleNamespace(shape=(4,), dtype=torch.float32, device=torch.device("cuda"))
    with pytest.raises(TypeError, match="copy_"):  # the copy itself needs a card
        optimizer_state._in_ram(on_a_card, pin=True)
    assert asked == [((4,), torch.float32, True)]
