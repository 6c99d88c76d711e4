"""What every kind of network must do, run over the registry: a new kind is tested by being registered."""

import pytest
import torch

from library.config.tables.network import NetworkTable
from library.errors import ConfigError, NetworkFileError
from library.models.checkpoint_file import TransformerFile
from library.models.load import Residence, load_transformer
from library.networks import NETWORKS, build
from library.networks.arguments import resolve
from library.networks.file import layouts, save_network
from library.networks.loading import load_network, merge_networks
from library.networks.metadata import Description
from library.networks.prospect import look_ahead
from library.networks.shapes import trained
from library.networks.size import file_sizes
from tests.networks.support import both, inputs, network_on, relative

EXTRA = {
    "lokr": [{}, {"network_args": ("factor=4", "decompose_both=true")}, {"network_args": ("full_matrix=true",)}],
    "diag-oft": [{"allow_comfy_only": True}],
    "lora": [{}, {"use_dora": True, "export_rank": 64}, {"use_rslora": True}],
    "loha": [{}, {"use_dora": True, "export_rank": 64}, {"use_rslora": True}],
}  # fmt: skip
TABLES = [
    {"network_module": kind, "network_dim": 4, "network_alpha": None if kind == "diag-oft" else 2.0, **more}
    for kind in NETWORKS
    for more in EXTRA.get(kind, [{}])
]
LAYOUTS = [
    (table, layout)
    for table in TABLES
    for layout in ("fused", "split")
    if layout == "fused" or not table.get("use_dora")
]


def label(value) -> str:
    if isinstance(value, str):
        return value
    extra = [str(v) for k, v in value.items() if k not in ("network_dim", "network_alpha", "allow_comfy_only")]
    return "-".join(extra)


every = pytest.mark.parametrize(("table", "layout"), LAYOUTS, ids=label)


@pytest.fixture
def model(tmp_path):
    return both(tmp_path / "base")[0]


@every
def test_starts_as_the_identity(model, table: dict, layout: str) -> None:
    before = model(**inputs())
    network_on(model, randomised=False, network_layout=layout, **table)
    assert relative(model(**inputs()), before) < 1e-5


@every
def test_gradients_reach_every_trained_tensor_and_nothing_else(model, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, **table)
    model(**inputs()).square().mean().backward()
    for name, parameter in network.named_trained().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.dtype == torch.float32, name
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)


@every
def test_checkpointing_changes_no_gradient(model, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, **table)
    found = []
    for checkpointing in (False, True):
        model.runner.checkpointing = checkpointing
        model.zero_grad()
        model(**inputs()).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in network.trained()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found))


@every
def test_merging_equals_the_forward_pass_and_files_give_it_back(model, tmp_path, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, **table)
    expected = model(**inputs())
    change = network.export()
    network.detach()
    before = model(**inputs())
    assert relative(expected, before) > 1e-3
    save_network(tmp_path / "net.safetensors", change, Description("net"), dtype=torch.float32)
    loaded = load_network(tmp_path / "net.safetensors")
    applied = loaded.apply(model)
    assert relative(model(**inputs()), expected) < 1e-4
    applied.remove()
    assert torch.equal(model(**inputs()), before)
    merge_networks(model, [(loaded, 1.0)])
    assert relative(model(**inputs()), expected) < 1e-4


@every
def test_training_resumes_from_the_state(model, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, **table)
    state, expected = network.state(), model(**inputs())
    network.detach()
    other = build(NetworkTable(network_layout=layout, **table), model, 9)
    other.load_state(state)
    other.attach()
    assert relative(model(**inputs()), expected) < 1e-6


@every
def test_names_are_those_that_programs_load(model, tmp_path, table: dict, layout: str) -> None:
    kind = resolve(NetworkTable(network_layout=layout, **table)).kind
    network = network_on(model, network_layout=layout, **table)
    change = network.export()
    ((_, tensors),) = layouts(tmp_path / "n.safetensors", change, "kohya", torch.float32)
    stems = {key.split(".")[0] for key in tensors}
    lora_like = kind in ("lora", "locon", "full") or table.get("use_dora")
    prefix = "lora_unet_" if layout == "fused" or lora_like else "lycoris_"
    assert all(stem.startswith(prefix) for stem in stems)
    for stem in stems:
        alpha = tensors[f"{stem}.alpha"]
        assert alpha.ndim == 0 and alpha.dtype == torch.float32
        if lora_like:
            assert float(alpha) == tensors[f"{stem}.lora_down.weight"].shape[0]
    assert not any(key.endswith((".diff", "dora_scale", "set_weight")) for key in tensors)
    if not lora_like:
        with pytest.raises(NetworkFileError, match="convert to LoRA"):
            layouts(tmp_path / "n.safetensors", change, "diffusers", torch.float32)


FORMS: tuple[dict, ...] = (
    {}, {"network_targets": "reference"}, {"network_targets": "all-linear"}, {"train_x_embedder": True},
    {"network_init": "pissa"},
)  # fmt: skip


@every
def test_sizes_are_counted_as_built_and_written(model, tmp_path, table: dict, layout: str) -> None:
    """Parameters and files, before anything is built: the same numbers, and the same refusals, as after training."""
    linears = {name: (linear.out_features, linear.in_features) for name, linear in model.linears().items()}
    seen = 0
    for more in FORMS:
        settled = NetworkTable(network_layout=layout, **table, **more)
        try:
            network = network_on(model, network_layout=layout, **table, **more)
        except ConfigError:
            with pytest.raises(ConfigError):
                look_ahead(settled, linears)
            continue
        plan, change = look_ahead(settled, linears), network.export()
        network.detach()
        assert trained(plan) == sum(parameter.numel() for parameter in network.trained())
        for format in ("kohya", "diffusers", "both"):
            try:
                written = layouts(tmp_path / "n.safetensors", change, format, torch.bfloat16)
            except NetworkFileError as error:
                with pytest.raises(NetworkFileError) as refused:
                    file_sizes(plan, format, 2)
                assert str(refused.value) == str(error)
                continue
            sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for _, tensors in written]
            assert [size for _, size in file_sizes(plan, format, 2)] == sizes, (more, format)
            seen += 1
    assert seen >= 3


@every
def test_initial_values_depend_on_the_seed_alone(model, table: dict, layout: str) -> None:
    torch.manual_seed(1)
    first = build(NetworkTable(network_layout=layout, **table), model, 3).state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(NetworkTable(network_layout=layout, **table), model, 3).state()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_module_dropout_leaves_whole_modules_out(model, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, module_dropout=0.999999, **table)
    with_network = model(**inputs())
    network.begin_step(0, 0, ("a", "b"))
    dropped = model(**inputs())
    network.detach()
    assert relative(dropped, model(**inputs())) < 1e-6
    assert relative(dropped, with_network) > 1e-3


@every
def test_norms_can_be_clamped_or_the_key_is_refused(model, table: dict, layout: str) -> None:
    settled = {"network_layout": layout, "scale_weight_norms": 0.01, **table}
    if table["network_module"] == "diag-oft" or table.get("use_dora"):
        with pytest.raises(ConfigError, match="scale_weight_norms"):
            build(NetworkTable(**settled), model, 0)
        return
    network = network_on(model, **settled)
    clamped, mean, largest = network.clamp_norms(0.01)
    assert clamped > 0 and mean < 0.0101 and largest < 0.0101
    for (module, rows), factors in network.export().entries.items():
        weight = model.get_submodule(module).weight[rows[0] : rows[1]]
        assert float(factors.delta(weight).norm()) < 0.0101, (module, rows)
    assert network.clamp_norms(0.02)[0] == 0


@pytest.mark.parametrize("table", [{"use_dora": True}, {"network_module": "full"}], ids=["dora", "full"])
def test_what_a_smaller_export_rank_loses_is_said(model, caplog, table: dict) -> None:
    network = network_on(model, network_dim=2, export_rank=3, **table)
    with caplog.at_level("INFO", "library.networks.network"):
        change = network.export()
    assert {factors.rank for factors in change.entries.values()} == {3}
    assert "relative error" in caplog.text
    exact = dict(network.by_path["double_blocks.0.img_mlp.0"].factors())
    ((rows, factors),) = exact.items()
    values = torch.linalg.svdvals(factors.delta())
    lost = (factors.delta() - change.entries[("double_blocks.0.img_mlp.0", rows)].delta()).norm()
    assert abs(float(lost) - float(values[3:].norm())) < 1e-4


@pytest.fixture
def quantised(tmp_path):
    both(tmp_path / "base")
    return load_transformer(TransformerFile.open(tmp_path / "base"), residence=Residence("nf4"))


@pytest.mark.parametrize("table", TABLES, ids=label)
def test_on_a_quantised_base(quantised, table: dict) -> None:
    """The same contract over nf4 weights; DoRA, which needs the exact weight, is refused with the reason."""
    if table.get("use_dora"):
        with pytest.raises(ConfigError, match="quantised"):
            build(NetworkTable(**table), quantised, 0)
        return
    before = quantised(**inputs())
    network = build(NetworkTable(**table), quantised, 0)
    network.attach()
    assert relative(quantised(**inputs()), before) < 1e-5
    with torch.no_grad():
        for parameter in network.trained():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    output = quantised(**inputs())
    output.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.trained())
    for name, adapter in network.by_path.items():
        linear = quantised.get_submodule(name)
        x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(2))
        weight = linear.dequantized()
        for (start, stop), factors in adapter.factors():
            weight[start:stop] = weight[start:stop] + factors.delta(weight[start:stop])
        expected = torch.nn.functional.linear(x, weight, linear.bias)
        assert relative(linear(x), expected) < 1e-4, name


def test_adapters_live_where_the_layer_computes(model, monkeypatch) -> None:
    """A streamed weight is stored in host memory; its adapter is on the device, modulation's where modulation is."""
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("meta")))
    network = build(NetworkTable(network_targets="all-linear", train_x_embedder=True), model, 0)
    for name, parameter in network.named_trained().items():
        assert parameter.device.type == ("cpu" if "mod" in name.split(":")[0] and "_blocks" in name else "meta"), name
