"""Optimizer state that waits in RAM is the same state."""

import bitsandbytes
import pytest
import torch

from library.memory import optimizer_state
from library.memory.optimizer_state import keep_state_in_ram


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_steps_are_the_same_and_the_state_travels(kind, monkeypatch) -> None:
    moves = []
    original = optimizer_state._move
    monkeypatch.setattr(optimizer_state, "_move", lambda *a, **k: moves.append(k["to_host"]) or original(*a, **k))
    values = []
    for in_ram in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(80, 80))
        optimizer = kind([parameter], lr=0.1)
        if in_ram:
            keep_state_in_ram(optimizer)
        for _ in range(3):
            parameter.grad = torch.randn(80, 80)
            optimizer.step()
        values.append(parameter.detach().clone())
    assert torch.equal(*values)
    assert moves == [False, True] * 3


def test_state_leaves_a_device_and_comes_back() -> None:
    class Elsewhere(torch.optim.SGD):
        seen = []

        @torch.no_grad()
        def step(self, closure=None):
            self.seen.append(next(iter(self.state.values()))["memory"].device.type)

    # The meta device stands in for a card: what is moved off it and back is visible.
    parameter = torch.nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = Elsewhere([parameter], lr=1.0)
    optimizer.state[parameter]["memory"] = torch.zeros(4)
    optimizer.state[parameter]["count"] = torch.tensor(1.0)
    optimizer.register_step_pre_hook(lambda *_: optimizer_state._move(optimizer, to_host=False, pin=False))
    optimizer.step()
    assert Elsewhere.seen == ["meta"] and optimizer.state[parameter]["count"].device.type == "cpu"
