"""Starting from a file keeps the change it makes and its effective step; base_weights become part of the base."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.models.checkpoint_file import TransformerFile
from library.models.load import Residence, load_transformer
from library.networks import build
from library.networks.file import save_network
from library.networks.loading import load_network
from library.networks.metadata import Description
from tests.networks.support import both, inputs, network_on, relative
from tests.networks.test_contract import LAYOUTS, label


@pytest.fixture
def model(tmp_path):
    return both(tmp_path / "base")[0]


def save(path, network, format: str = "kohya"):
    description = Description("net", trained_scales=network.trained_scales())
    return save_network(path, network.export(), description, format=format, dtype=torch.float32)


def started(model, path, **table):
    network = build(NetworkTable(network_weights=path, **table), model, 1)
    network.attach()
    return network


WARM = [(table, layout) for table, layout in LAYOUTS if not table.get("use_dora")]


@pytest.mark.parametrize(("table", "layout"), WARM, ids=label)
def test_round_trip_of_every_network(model, tmp_path, table: dict, layout: str) -> None:
    network = network_on(model, network_layout=layout, **table)
    expected, scales = model(**inputs()), network.trained_scales()
    save(tmp_path / "net.safetensors", network)
    network.detach()
    again = started(model, tmp_path / "net.safetensors", network_layout=layout, **table)
    assert relative(model(**inputs()), expected) < 1e-5
    assert again.trained_scales() == scales


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize(
    "table",
    [
        {"network_targets": "reference"},
        {"network_targets": "all-linear"},
        {"train_x_embedder": True},
        {"network_reg_dims": ("img_attn=7",), "lora_layers": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")},
    ],
)
def test_ranks_alphas_and_targets_come_from_the_file(model, tmp_path, table: dict, layout: str, format: str) -> None:
    network = network_on(model, network_dim=3, network_alpha=1.5, network_layout=layout, **table)
    expected = model(**inputs())
    files = save(tmp_path / "net.safetensors", network, format)
    scales = {path: adapter.scale for path, adapter in network.by_path.items() if hasattr(adapter, "scale")}
    shapes = {name: tuple(p.shape) for name, p in network.named_trained().items()}
    network.detach()
    if format == "diffusers" and layout == "fused":
        shapes = None  # a fused network whose parts went separate ways comes back as such
    keep = {"train_x_embedder": True} if "train_x_embedder" in table else {}
    again = started(model, files[0], dim_from_weights=True, network_layout=layout, **keep)
    assert relative(model(**inputs()), expected) < 1e-5
    if shapes is not None:
        assert {name: tuple(p.shape) for name, p in again.named_trained().items()} == shapes
    assert {p: a.scale for p, a in again.by_path.items() if hasattr(a, "scale")} == pytest.approx(scales)


def test_the_step_stays_the_same(model, tmp_path) -> None:
    """One step of plain gradient descent from the file changes the model as it would have without the file."""
    table = {"network_dim": 4, "network_alpha": 1.0, "network_targets": "attn"}

    def step(network) -> torch.Tensor:
        model.zero_grad()
        model(**inputs()).square().mean().backward()
        with torch.no_grad():
            for parameter in network.trained():
                parameter -= 0.5 * parameter.grad
        return model(**inputs()).detach()

    network = network_on(model, **table)
    save(tmp_path / "net.safetensors", network)
    expected = step(network)
    network.detach()
    again = started(model, tmp_path / "net.safetensors", dim_from_weights=True)
    assert relative(step(again), expected) < 1e-4


def test_a_larger_rank_keeps_the_change_and_an_unset_alpha_keeps_the_scale(model, tmp_path) -> None:
    network = network_on(model, network_dim=2, network_alpha=1.0)
    expected = model(**inputs())
    save(tmp_path / "net.safetensors", network)
    network.detach()
    again = started(model, tmp_path / "net.safetensors", network_dim=6)
    assert relative(model(**inputs()), expected) < 1e-5
    assert {adapter.scale for adapter in again.by_path.values()} == {0.5}
    again.detach()
    other = started(model, tmp_path / "net.safetensors", network_dim=6, network_alpha=6.0)
    assert relative(model(**inputs()), expected) < 1e-5
    assert {adapter.scale for adapter in other.by_path.values()} == {1.0}


@pytest.mark.parametrize("spelling", ["onetrainer", "ai-toolkit", "kohya with its own alpha"])
def test_other_trainers_files(model, tmp_path, spelling: str) -> None:
    from tests.networks.test_file import _onetrainer

    network = network_on(model, network_layout="split", network_dim=4)
    expected = model(**inputs())
    kohya = spelling.startswith("kohya")
    (file, *_) = save(tmp_path / "net.safetensors", network, "kohya" if kohya else "diffusers")
    network.detach()
    tensors = load_file(file)
    if spelling == "onetrainer":
        tensors = {_onetrainer(key): tensor for key, tensor in tensors.items()}
    if kohya:
        tensors = {key: tensor / 4 if key.endswith("alpha") else tensor for key, tensor in tensors.items()}
        tensors = {key: tensor * 4 if "lora_up" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    again = started(model, tmp_path / "other.safetensors", dim_from_weights=True, network_layout="split")
    assert relative(model(**inputs()), expected) < 1e-5
    assert {adapter.scale for adapter in again.by_path.values()} == {0.25 if kohya else 1.0}


@pytest.mark.parametrize(
    ("saved", "wanted", "says"),
    [
        ({"network_dim": 8}, {"network_dim": 4}, "rank 8"),
        ({"network_layout": "split"}, {}, "network_layout"),
        ({"network_targets": "blocks"}, {"network_targets": "attn"}, "does not train"),
        ({"network_module": "lokr"}, {}, "not a LoRA"),
        ({}, {"network_module": "lokr"}, "not lokr"),
        ({"network_module": "lokr"}, {"network_module": "lokr", "network_args": ("factor=2",)}, "cut differently"),
        ({}, {"use_dora": True}, "DoRA"),
        ({"train_x_embedder": True}, {}, "img_in"),
    ],
)
def test_what_cannot_be_held_exactly_is_refused(model, tmp_path, saved: dict, wanted: dict, says: str) -> None:
    network = network_on(model, **saved)
    save(tmp_path / "net.safetensors", network)
    network.detach()
    with pytest.raises(ConfigError, match=says):
        started(model, tmp_path / "net.safetensors", **wanted)


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
def test_base_weights_are_merged_into_the_base(tmp_path, precision: str | None) -> None:
    both(tmp_path / "base")
    model = load_transformer(TransformerFile.open(tmp_path / "base"))
    network = network_on(model, network_targets="reference", train_x_embedder=True)
    save(tmp_path / "net.safetensors", network)
    network.detach()
    if precision is not None:
        model = load_transformer(TransformerFile.open(tmp_path / "base"), residence=Residence(precision))
    expected = load_network(tmp_path / "net.safetensors").apply(model)
    output = model(**inputs())
    expected.remove()
    table = {"base_weights": (tmp_path / "net.safetensors",), "base_weights_multiplier": (1.0,)}
    plain = model(**inputs())
    network_on(model, randomised=False, **table)
    assert relative(model(**inputs()), output) < (1e-5 if precision is None else 0.5 * relative(plain, output))


def test_a_continued_rslora_run_keeps_its_step(model, tmp_path) -> None:
    """The scale is alpha / sqrt(rank): taken for alpha / rank it would grow by sqrt(rank)."""
    network = network_on(model, network_dim=16, network_alpha=2.0, use_rslora=True)
    save(tmp_path / "net.safetensors", network)
    network.detach()
    for more in ({"network_dim": 16}, {"dim_from_weights": True}, {"network_dim": 64}):
        again = started(model, tmp_path / "net.safetensors", use_rslora=True, **more)
        assert {adapter.scale for adapter in again.by_path.values()} == {0.5}, more
        again.detach()


def test_a_continued_pissa_run_keeps_its_scale(model, tmp_path) -> None:
    """Its file has twice the rank, the start taken off again."""
    network = network_on(model, network_dim=4, network_alpha=2.0, network_init="pissa")
    save(tmp_path / "net.safetensors", network)
    network.detach()
    again = started(model, tmp_path / "net.safetensors", dim_from_weights=True)
    assert {(adapter.rank, adapter.scale) for adapter in again.by_path.values()} == {(8, 0.5)}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"lora_layers": ("attn.to_q", "attn.add_q_proj")}, "to_k"),
        ({}, "bias of img_in"),
        ({"train_x_embedder": True}, "bias of img_in"),
    ],
)
def test_nothing_of_a_file_is_left_out_silently(model, tmp_path, wanted: dict, says: str) -> None:
    """Rows of a fused module that are not trained here, and biases."""
    more = {} if "lora_layers" in wanted else {"train_x_embedder": True, "train_x_embedder_bias": True}
    network = network_on(model, network_targets="attn", **more)
    change = network.export()
    network.detach()
    if "lora_layers" in wanted:
        for slot in [slot for slot in change.entries if not slot[0].endswith(("qkv", "linear1"))]:
            change.entries.pop(slot)
    elif not wanted:
        change.entries = {slot: factors for slot, factors in change.entries.items() if slot[0] != "img_in"}
    save_network(tmp_path / "net.safetensors", change, Description("net"), dtype=torch.float32)
    with pytest.raises(ConfigError, match=says):
        started(model, tmp_path / "net.safetensors", **{"network_targets": "attn", **wanted})


def test_the_bias_of_x_embedder_is_taken_along(model, tmp_path) -> None:
    table = {"train_x_embedder": True, "train_x_embedder_bias": True, "network_targets": "attn"}
    network = network_on(model, **table)
    expected = network.by_path["img_in"].bias_change.detach().clone()
    save(tmp_path / "net.safetensors", network)
    network.detach()
    again = started(model, tmp_path / "net.safetensors", **table)
    assert relative(again.by_path["img_in"].bias_change, expected) < 1e-6
