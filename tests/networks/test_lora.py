"""Our LoRA is a LoRA: the identity at the start, PEFT's gradients in both layouts, exact in every precision."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from library.config.tables.network import NetworkTable
from library.models.keymap import linear_shapes
from library.networks import build, parts
from library.networks.factors import DOWN, UP
from library.networks.targets import REFERENCE
from tests.networks.support import both, diffusers_output, inputs, network_on, relative

RANK = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return both(tmp_path_factory.mktemp("base"), torch.float64)


def peft_on(theirs, suffixes: tuple[str, ...]):
    """PEFT's own LoRA on a copy of diffusers' transformer."""
    import copy

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(suffixes), init_lora_weights=False)
    return inject_adapter_in_model(config, copy.deepcopy(theirs)).double()


def copy_to_peft(network, model, theirs) -> list:
    """Give PEFT's factors our values; returns (adapter, part, PEFT's linear) for every trained part."""
    sizes, linears, found = linear_shapes(model.shape), dict(theirs.named_modules()), []
    for module, adapter in network.by_path.items():
        for part in parts.parts(module, *sizes[module]):
            pair = next((p for p in adapter.pairs if p.rows[0] <= part.start and part.stop <= p.rows[1]), None)
            if pair is None:
                continue
            other = linears[part.diffusers]
            first = pair.up[0] + part.start - pair.rows[0]
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(adapter.down[slice(*pair.hidden)])
                other.lora_B["default"].weight.copy_(adapter.up[first : first + part.stop - part.start])
            found.append((adapter, pair, first, part, other))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("preset", ["reference", "blocks"])
def test_outputs_and_gradients_are_pefts(models, layout: str, preset: str, checkpointing: bool) -> None:
    """Fused: PEFT's q, k, v (and mlp) share one A, so our gradient is the sum of theirs; B's rows are equal."""
    ours, theirs = models
    ours.runner.checkpointing = checkpointing
    suffixes = REFERENCE if preset == "reference" else (*REFERENCE, "proj_mlp", "single_transformer_blocks.0.proj_out",
                                                        "single_transformer_blocks.1.proj_out")  # fmt: skip
    network = network_on(ours, network_dim=RANK, network_layout=layout, network_targets=preset)
    network.double()
    peft = peft_on(theirs, suffixes)
    assert len([name for name in peft.state_dict() if "lora_A" in name]) == 2 * 12 + 2 * (
        3 if preset == "reference" else 5
    )
    matched = copy_to_peft(network, ours, peft)
    given = inputs(torch.float64)
    actual, expected = ours(**given), diffusers_output(peft, given)
    assert relative(actual, expected) < 1e-5  # diffusers rotates in float32
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    summed: dict[tuple[int, int], torch.Tensor] = {}
    for adapter, pair, first, part, other in matched:
        rows = slice(first, first + part.stop - part.start)
        assert relative(adapter.up.grad[rows], other.lora_B["default"].weight.grad) < 1e-4, part
        key = (id(adapter), pair.hidden[0])
        summed[key] = summed.get(key, 0) + other.lora_A["default"].weight.grad
    for adapter, pair, *_ in matched:
        assert relative(adapter.down.grad[slice(*pair.hidden)], summed[(id(adapter), pair.hidden[0])]) < 1e-4
    assert all(p.grad is None for name, p in ours.named_parameters() if ".adapter." not in name)
    network.detach()
    ours.runner.checkpointing = False


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("init", ["gaussian", "kaiming", "pissa"])
def test_starts_as_the_base_model(tmp_path, layout: str, init: str) -> None:
    ours, _ = both(tmp_path)
    before = ours(**inputs())
    network = network_on(ours, randomised=False, network_layout=layout, network_init=init, network_alpha=8.0)
    after = ours(**inputs())
    assert relative(after, before) < (1e-5 if init == "pissa" else 1e-7)
    (after.square().mean()).backward()
    for name, parameter in network.named_trained().items():
        moves = init == "pissa" or name.endswith(":up")
        assert (parameter.grad.abs().max() > 0) == moves, name
    network.detach()
    assert torch.equal(ours(**inputs()), before)


def test_initial_values_depend_on_the_seed_alone(models) -> None:
    ours, _ = models
    draws = [build(NetworkTable(), ours, seed).state() for seed in (1, 1, 2)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert not torch.equal(draws[0]["single_blocks.0.linear1:down"], draws[2]["single_blocks.0.linear1:down"])
    down = build(NetworkTable(network_dim=8), ours, 0).state()["single_blocks.0.linear2:down"]
    assert abs(float(down.std()) - 1 / 8) < 0.01
    kaiming = build(NetworkTable(network_init="kaiming"), ours, 0).state()["single_blocks.0.linear2:down"]
    assert float(kaiming.abs().max()) <= kaiming.shape[1] ** -0.5


def test_pissa_starts_at_the_largest_directions(models) -> None:
    ours, _ = models
    network = build(NetworkTable(network_init="pissa", network_dim=4), ours, 0)
    adapter, weight = network.by_path["double_blocks.0.img_mlp.0"], ours.double_blocks[0].img_mlp[0].weight
    values = torch.linalg.svdvals(weight)
    product = (adapter.up @ adapter.down).double() * adapter.scale
    assert abs(float((weight - product).norm() / values[4:].norm()) - 1) < 1e-3


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("preset", ["reference", "attn", "all-linear"])
def test_merging_is_the_forward_pass(tmp_path, layout: str, preset: str) -> None:
    ours, _ = both(tmp_path)
    network = network_on(ours, network_layout=layout, network_targets=preset, network_alpha=2.0, network_dim=5)
    with_network = ours(**inputs())
    change = network.export()
    network.detach()
    assert relative(ours(**inputs()), with_network) > 1e-2
    for (module, (start, stop)), factors in change.entries.items():
        assert factors.alpha == factors.rank
        weight = ours.get_submodule(module).weight
        weight.data[start:stop] += factors.tensors[UP] @ factors.tensors[DOWN]
    assert relative(ours(**inputs()), with_network) < 1e-5


def test_fp32_masters_on_a_bf16_base(tmp_path) -> None:
    ours, _ = both(tmp_path)
    ours.to(torch.bfloat16)
    ours.dtype = torch.bfloat16
    network = network_on(ours, network_targets="reference")
    given = {name: value.bfloat16() if name in ("tokens", "text") else value for name, value in inputs().items()}
    output = ours(**given)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    for name, parameter in network.named_trained().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_x_embedder_moves_when_asked_and_nothing_else_does(tmp_path) -> None:
    ours, _ = both(tmp_path)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    network = network_on(ours, randomised=False, train_x_embedder=True, network_targets="attn")
    groups = {group.role: group for group in network.parameters_by_group()}
    assert list(groups["x_embedder"].parameters) == ["img_in:change"]
    optimizer = torch.optim.SGD(network.trained(), lr=0.1)
    ours(**inputs()).square().mean().backward()
    optimizer.step()
    change = network.export().entries[("img_in", (0, 32))].tensors["diff"]
    assert change.abs().max() > 0
    network.detach()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())

    again = network_on(ours, randomised=False, network_targets="attn")
    assert not any(name.startswith("img_in") for name in again.named_trained())
    assert ours.img_in.adapter is None


def test_x_embedder_gradient_is_that_of_its_weight(tmp_path) -> None:
    ours, theirs = both(tmp_path, torch.float64)
    network = network_on(ours, randomised=False, train_x_embedder=True, train_x_embedder_bias=True)
    network.double()
    theirs.requires_grad_(False)
    theirs.x_embedder.requires_grad_(True)
    given = inputs(torch.float64)
    ours(**given).sum().backward()
    diffusers_output(theirs, given).sum().backward()
    adapter = network.by_path["img_in"]
    assert relative(adapter.change.grad, theirs.x_embedder.weight.grad) < 1e-4
    assert relative(adapter.bias_change.grad, theirs.x_embedder.bias.grad) < 1e-4


def test_attach_returns_exactly_what_requires_grad(tmp_path) -> None:
    ours, _ = both(tmp_path)
    network = build(NetworkTable(train_x_embedder=True), ours, 0)
    trained = network.attach()
    assert {id(p) for p in trained} == {id(p) for p in ours.parameters() if p.requires_grad}
    assert {id(p) for p in trained} == {
        id(p) for group in network.parameters_by_group() for p in group.parameters.values()
    }
    with pytest.raises(AssertionError, match="already carries"):
        build(NetworkTable(), ours, 0).attach()
    network.detach()
    ours.txt_in.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="txt_in.weight"):
        build(NetworkTable(), ours, 0).attach()


def test_groups_hold_rates_and_loraplus_side(tmp_path) -> None:
    ours, _ = both(tmp_path)
    network = build(NetworkTable(network_reg_lrs=("single_blocks=1e-5",), network_targets="attn"), ours, 0)
    keys = {(group.role, group.learning_rate, group.is_up) for group in network.parameters_by_group()}
    assert keys == {("transformer", rate, is_up) for rate in (None, 1e-5) for is_up in (True, False)}
    for group in network.parameters_by_group():
        assert all(name.endswith(":up") == group.is_up for name in group.parameters)
        assert all(name.startswith("single") == (group.learning_rate == 1e-5) for name in group.parameters)


def test_norms_are_clamped_per_pair(tmp_path) -> None:
    ours, _ = both(tmp_path)
    network = network_on(ours, network_layout="split", network_alpha=8.0)
    norms = {slot: factors.delta().norm() for slot, factors in network.export().entries.items()}
    limit = float(sorted(norms.values())[len(norms) // 2])
    clamped, mean, largest = network.clamp_norms(limit)
    assert clamped == sum(float(norm) > limit * (1 + 1e-6) for norm in norms.values())
    assert mean <= largest <= limit * (1 + 1e-5)
    for slot, factors in network.export().entries.items():
        assert abs(float(factors.delta().norm()) - min(limit, float(norms[slot]))) < 1e-4


def test_state_round_trip(tmp_path) -> None:
    ours, _ = both(tmp_path)
    network = network_on(ours, network_init="pissa", train_x_embedder=True)
    state, output = network.state(), ours(**inputs())
    network.detach()
    other = build(NetworkTable(network_init="pissa", train_x_embedder=True), ours, 5)
    other.load_state(state)
    other.attach()
    assert torch.equal(ours(**inputs()), output)
    with pytest.raises(AssertionError, match="another network"):
        other.load_state({**state, "stray:down": torch.zeros(1)})
