"""Dropout masks are functions of (seed, micro-step, item, module): the same again, whatever else happens."""

import pytest
import torch

from tests.networks.support import both, inputs, network_on

KINDS = {"network_dropout": 0.5, "rank_dropout": 0.5, "module_dropout": 0.5}


def gradients(network) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in network.trained()]
    for parameter in network.trained():
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_belong_to_their_step_and_item(tmp_path, kind: str) -> None:
    ours, _ = both(tmp_path)
    network = network_on(ours, **{kind: KINDS[kind]}, network_dim=8)
    given = inputs()
    calm = ours(**given)
    network.begin_step(1, 7, ("a", "b"))
    first = ours(**given)
    assert not torch.allclose(first, calm)
    torch.manual_seed(123)
    assert torch.equal(ours(**given), first)
    network.begin_step(1, 8, ("a", "b"))
    assert not torch.allclose(ours(**given), first)
    network.begin_step(1, 7, ("a", "c"))
    changed = ours(**given)
    assert torch.allclose(changed[0], first[0], atol=1e-6)
    assert not torch.allclose(changed[1], first[1])
    with network.at_rest():
        assert torch.equal(ours(**given), calm)
    assert torch.equal(ours(**given), changed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpointing_drops_the_same_values_twice(tmp_path, kind: str) -> None:
    ours, _ = both(tmp_path)
    network = network_on(ours, **{kind: KINDS[kind]})
    network.begin_step(0, 0, ("x", "y"))
    ours(**inputs()).square().mean().backward()
    expected = gradients(network)
    ours.runner.checkpointing = True
    ours(**inputs()).square().mean().backward()
    for mine, other in zip(gradients(network), expected):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-7)


def test_dropped_ranks_are_made_up_for(tmp_path) -> None:
    ours, _ = both(tmp_path, double=1, single=1)
    network = network_on(ours, rank_dropout=0.3, network_targets="attn", network_dim=8)
    adapter = network.by_path["double_blocks.0.img_attn.proj"]
    x = torch.randn(1, 4, adapter.down.shape[1])
    masks = []
    for step in range(400):
        network.begin_step(0, step, ("item",))
        masks.append(adapter.project(x) / (x @ adapter.down.t()))
    values = torch.stack(masks)
    assert set(values.mul(0.7).round(decimals=3).abs().unique().tolist()) == {0.0, 1.0}
    assert abs(float(values.detach().mean()) - 1) < 0.05
