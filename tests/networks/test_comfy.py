"""ComfyUI's own code loads every network whole, to the weights that plain arithmetic gives, and computes our step."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.flow.euler import SigmaSchedule
from library.flow.packing import image_ids, pack_latents, pack_mask, unpack_latents
from library.networks import NETWORKS, acceptance
from library.networks.file import save_network
from library.networks.graph import NODES
from library.networks.metadata import Description
from tests.networks.comfy_process import SHAPE, Comfy, require_comfy, write_bfl_checkpoint
from tests.networks.support import both, network_on, relative
from tests.networks.test_contract import LAYOUTS, label
from tests.networks.test_workflow import graphs

HEIGHT = WIDTH = 8


@pytest.fixture(scope="module")
def comfy():
    require_comfy()
    running = Comfy()
    yield running
    running.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory, comfy):
    folder = tmp_path_factory.mktemp("comfy")
    ours, _ = both(folder / "base", **SHAPE)
    return ours, write_bfl_checkpoint(ours, folder / "fill.safetensors")


def files_of(tmp_path, ours, format: str = "kohya", **table):
    network = network_on(ours, **table)
    change = network.export()
    files = save_network(tmp_path / "net.safetensors", change, Description("net"), format=format, dtype=torch.float32)
    network.detach()
    return change, files


def check_deltas(comfy, base, tmp_path, change, file) -> None:
    """No key unread, and every weight's change is the factors' product."""
    ours, checkpoint = base
    answer = comfy.ask(
        "deltas", base=str(checkpoint), networks=[[str(file), 1.0]], output=str(tmp_path / "d.safetensors")
    )
    assert answer["unread"] == []
    found = load_file(tmp_path / "d.safetensors")
    expected: dict[str, torch.Tensor] = {}
    for (module, (start, stop)), factors in change.entries.items():
        weight = ours.get_submodule(module).weight
        delta = expected.setdefault(f"{module}.weight", torch.zeros_like(weight))
        delta[start:stop] += factors.delta(weight[start:stop])
    expected |= {f"{module}.bias": bias for module, bias in change.biases.items()}
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert relative(found[name], delta) < 2e-5, name


def test_the_tiny_base_is_seen_as_fill(comfy, base) -> None:
    answer = comfy.ask("detect", base=str(base[1]))
    assert answer["config"] == "FluxInpaint"


@pytest.mark.parametrize(("table", "layout"), LAYOUTS, ids=label)
def test_every_network_arrives_whole(comfy, base, tmp_path, table: dict, layout: str) -> None:
    change, files = files_of(tmp_path, base[0], network_layout=layout, **table)
    check_deltas(comfy, base, tmp_path, change, files[0])


def test_every_registered_kind_is_among_them() -> None:
    assert {table["network_module"] for table, _ in LAYOUTS} == set(NETWORKS)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "table",
    [
        {"train_x_embedder": True},
        {"train_x_embedder": True, "train_x_embedder_bias": True},
        {"network_targets": "all-linear"},
        {"network_targets": "reference"},
        {"network_layout": "split"},
        {"network_reg_dims": ("img_attn=8",), "network_alpha": 1.0},
    ],
)
def test_every_format_arrives_whole(comfy, base, tmp_path, format: str, table: dict) -> None:
    change, files = files_of(tmp_path, base[0], format, **table)
    for file in files:
        check_deltas(comfy, base, tmp_path, change, file)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "table", [{}, {"network_module": "lokr"}, {"train_x_embedder": True}], ids=["lora", "lokr", "img_in"]
)
def test_one_denoising_step_is_ours(comfy, base, tmp_path, table: dict, masked: bool) -> None:
    """Without a mask ComfyUI's Fill takes an all-white one; with one, it packs ours."""
    ours, checkpoint = base
    draw = torch.Generator().manual_seed(4)
    given = {
        "latents": torch.randn(1, 16, HEIGHT, WIDTH, generator=draw),
        "concat_latents": torch.randn(1, 16, HEIGHT, WIDTH, generator=draw),
        "timestep": torch.tensor([0.6]),
        "context": torch.randn(1, 7, 4096, generator=draw),
        "pooled": torch.randn(1, 768, generator=draw),
        "guidance": torch.tensor([30.0]),
    }
    mask = torch.ones(1, 1, 8 * HEIGHT, 8 * WIDTH)
    if masked:
        mask[..., : 4 * WIDTH] = 0
        given["mask"] = mask
    save_file(given, tmp_path / "inputs.safetensors")
    change, (file, *_) = files_of(tmp_path, ours, **table)
    answer = comfy.ask(
        "forward", base=str(checkpoint), networks=[[str(file), 1.0]], inputs=str(tmp_path / "inputs.safetensors"),
        output=str(tmp_path / "output.safetensors"),
    )  # fmt: skip
    assert answer["unread"] == []
    theirs = load_file(tmp_path / "output.safetensors")
    network = network_on(ours, **table)
    # ComfyUI scales latents by itself on the way in; our condition is given in model space.
    condition = theirs["concat"][:, :16]
    tokens = torch.cat([pack_latents(given["latents"]), pack_latents(condition), pack_mask(mask)], dim=-1)
    predicted = ours(
        tokens, given["context"], given["pooled"], given["timestep"], given["guidance"], image_ids(HEIGHT, WIDTH)
    )  # fmt: skip
    network.detach()
    assert relative(unpack_latents(predicted, HEIGHT, WIDTH), theirs["output"]) < 2e-5


def test_two_networks_with_strengths_add_up(comfy, base, tmp_path) -> None:
    ours, checkpoint = base
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, (file, *_) = files_of(tmp_path / "a", ours)
    second, (other, *_) = files_of(tmp_path / "b", ours, seed=5, network_targets="attn")
    answer = comfy.ask(
        "deltas", base=str(checkpoint), networks=[[str(file), 0.5], [str(other), -2.0]],
        output=str(tmp_path / "d.safetensors"),
    )  # fmt: skip
    assert answer["unread"] == []
    found = load_file(tmp_path / "d.safetensors")
    name, slot = "double_blocks.0.img_attn.proj.weight", ("double_blocks.0.img_attn.proj", (0, 128))
    expected = 0.5 * first.entries[slot].delta() - 2.0 * second.entries[slot].delta()
    assert relative(found[name], expected) < 1e-5


EXTRAS = ["nodes_flux", "nodes_ip2p", "nodes_images", "nodes_mask", "nodes_post_processing", "nodes_model_advanced"]


def test_workflow_nodes_and_inputs_are_comfyuis(comfy) -> None:
    found = comfy.ask("node_definitions", names=list(NODES), extras=EXTRAS)
    assert found.keys() == NODES.keys()
    for name, kind in NODES.items():
        declared = found[name]
        assert {n: i["type"] for n, i in declared["inputs"].items()} == kind.inputs, name
        assert list(kind.inputs) == list(declared["inputs"]), f"{name}: widgets are stored in ComfyUI's order"
        assert tuple(declared["outputs"])[: len(kind.outputs)] == kind.outputs, name
    for _, graph in graphs():
        for node in graph.for_api().values():
            for name, value in node["inputs"].items():
                check_value(node["class_type"], name, value, found[node["class_type"]]["inputs"][name])


def check_value(kind: str, name: str, value, declared: dict) -> None:
    """A value the node accepts: one of its choices, within its range."""
    if isinstance(value, list) or name.endswith("_name") or name in ("image", "clip_name1", "clip_name2"):
        return
    if declared["choices"]:
        assert value in declared["choices"], (kind, name, value)
    if declared["min"] is not None:
        assert declared["min"] <= value <= declared["max"], (kind, name, value)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (768, 512), (1024, 1024), (1536, 640)])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_sigmas_are_ours(comfy, base, width: int, height: int, steps: int) -> None:
    """ComfyUI picks from a table of 10,000 sigmas, so its list agrees to the table's spacing (1e-4, shifted)."""
    answer = comfy.ask(
        "sigmas", base=str(base[1]), width=width, height=height, steps=steps, scheduler="simple",
        max_shift=1.15, base_shift=0.5,
    )  # fmt: skip
    ours = SigmaSchedule(use_dynamic_shifting=True).sigmas(steps, width * height // 256)
    assert torch.allclose(torch.tensor(answer["sigmas"], dtype=torch.float64), ours.double(), atol=3.2e-4)


def damaged(tensors: dict, how: str) -> dict:
    """A network's tensors with keys that programs are known to trip over."""
    extra = {
        "sound": {},
        "wrong name": {"lora_unet_double_blocks_0_img_atn_qkv.lora_up.weight": torch.zeros(4, 4)},
        "unknown suffix": {"lora_unet_double_blocks_0_img_attn_qkv.lora_sideways": torch.zeros(4)},
        "bias": {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.zeros(128)},
        "another model": {f"lora_unet_input_blocks_{i}_1_proj_in.lora_up.weight": torch.zeros(4, 4) for i in range(14)},
        "second text encoder": {"lora_te3_encoder_block_0_x.lora_up.weight": torch.zeros(4, 4)},
    }
    return tensors | extra[how]


@pytest.mark.parametrize(
    "how", ["sound", "wrong name", "unknown suffix", "bias", "another model", "second text encoder"]
)
def test_the_check_predicts_what_comfyui_leaves_unread(comfy, base, tmp_path, how: str) -> None:
    _, files = files_of(tmp_path, base[0], train_x_embedder=True)
    tensors = damaged(load_file(files[0]), how)
    save_file(tensors, tmp_path / "damaged.safetensors")
    answer = comfy.ask(
        "deltas", base=str(base[1]), networks=[[str(tmp_path / "damaged.safetensors"), 1.0]],
        output=str(tmp_path / "d.safetensors"),
    )  # fmt: skip
    unread = {line.rpartition(": ")[2] for line in answer["unread"]}
    lost = acceptance.fates({name: tuple(tensor.shape) for name, tensor in tensors.items()}).lost("ComfyUI")
    assert set(lost) == unread


def test_text_encoder_keys_are_comfyuis(comfy, tmp_path) -> None:
    from library.networks.change import Change
    from library.networks.factors import lora
    from library.networks.forms import kohya_tensors, peft_tensors

    names = [f"encoder.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in ("q", "k", "v", "out")]
    change = Change(text={name: lora(torch.randn(2, 32), torch.randn(32, 2)) for name in names})
    for number, tensors in enumerate((kohya_tensors(change, torch.float32), peft_tensors(change, torch.float32))):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        answer = comfy.ask("text_keys", network=str(tmp_path / f"{number}.safetensors"), layers=2)
        assert answer["unread"] == []
        assert len(answer["loaded"]) == len(names)
