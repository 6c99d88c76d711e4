"""The probe runs the largest moments and leaves no trace."""

import pytest
import torch

from library.config.tables import NetworkTable
from library.models.checkpoint_file import TransformerFile
from library.models.load import load_transformer
from library.models.probe import hold, probe_step
from library.networks import build
from tests.tiny import tiny_transformer


@pytest.fixture
def model(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    return load_transformer(TransformerFile.open(tmp_path))


def test_it_leaves_no_trace(model) -> None:
    parameters = build(NetworkTable(network_dim=2), model).attach()
    kept = torch.ones_like(parameters[0])
    parameters[0].grad = kept
    seen = []
    model.img_in.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    before = torch.get_rng_state()
    probe_step(model, width=96, height=64, batch=3, text_length=32)
    assert seen == [(3, 24, 384)]
    assert torch.equal(torch.get_rng_state(), before)
    assert parameters[0].grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(parameter.grad is None for parameter in parameters[1:])


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_of_earlier_micro_steps_are_there(model, accumulates, monkeypatch) -> None:
    parameters = build(NetworkTable(network_dim=2), model).attach()
    there = []
    model.img_in.register_forward_hook(
        lambda *_: there.append([parameter.grad is not None for parameter in parameters])
    )
    asked = []
    monkeypatch.setattr("library.models.probe.hold", lambda *arguments: asked.append(arguments) or [])
    probe_step(model, 64, 64, 1, 32, parameters, accumulates=accumulates, stepping=4.0)
    assert there == [[accumulates] * len(parameters)]
    assert asked == [(parameters, 4.0)]
    assert all(parameter.grad is None for parameter in parameters)


def test_running_out_shows_at_once_and_leaves_the_gradients(model, monkeypatch) -> None:
    parameters = build(NetworkTable(network_dim=2), model).attach()
    kept = parameters[0].grad = torch.ones_like(parameters[0])

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.final_layer), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        probe_step(model, 64, 64, 1, 32)
    assert parameters[0].grad is kept


def test_empty_memory_beside_each_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(10, 7)), torch.nn.Parameter(torch.zeros(3))]
    held = hold(parameters, 2.1)
    assert [tensor.nbytes for tensor in held] == [147, 7]
    assert hold(parameters, 0) == []
