"""The workflows beside a network: the wiring is each mode's, with this network's numbers, in both formats."""

import json

import pytest

from library.networks.graph import NODES, WIDGET_TYPES
from library.networks.metadata import Description
from library.networks.workflow import graph_for, write_workflows

MODES = ("edit", "edit_region", "mask", "spatial")


def described(**fields) -> Description:
    values = {
        "output_name": "circles", "modes": ("edit",), "edit_mask_value": 1.0, "sample_guidance": 30.0,
        "resolution": (768, 512), "prompt": "fill the circle", "seed": 11, "sample_steps": 28, **fields,
    }  # fmt: skip
    return Description(**values)


def graphs():
    yield "edit, black mask", graph_for("edit", "net.safetensors", described(edit_mask_value=0.0))
    for mode in MODES:
        yield mode, graph_for(mode, "net.safetensors", described())
    yield "edit with CLIP-L", graph_for("edit", "net.safetensors", described(trains_text_encoder=True))


def nodes_of(graph, kind: str) -> list[dict]:
    return [node["inputs"] for node in graph.for_api().values() if node["class_type"] == kind]


def source(graph, link: list) -> dict:
    return graph.for_api()[link[0]]


@pytest.mark.parametrize("mode", ["edit, black mask", *MODES])
def test_every_graph_carries_this_network(mode: str) -> None:
    graph = dict(graphs())[mode]
    (lora,) = nodes_of(graph, "LoraLoaderModelOnly")
    assert (lora["lora_name"], lora["strength_model"]) == ("net.safetensors", 1.0)
    assert nodes_of(graph, "CLIPTextEncode")[0]["text"] == "fill the circle"
    assert nodes_of(graph, "FluxGuidance")[0]["guidance"] == 30.0
    (sampler,) = nodes_of(graph, "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["cfg"], sampler["denoise"]) == (
        "euler",
        "simple",
        1.0,
        1.0,
    )
    assert (sampler["steps"], sampler["seed"]) == (28, 11)
    (scale,) = nodes_of(graph, "ImageScaleToTotalPixels")
    assert scale["resolution_steps"] == 16 and scale["megapixels"] == 0.375
    (shift,) = nodes_of(graph, "ModelSamplingFlux")
    assert (shift["max_shift"], shift["base_shift"]) == (1.15, 0.5)
    size = source(graph, shift["width"])
    assert size["class_type"] == "GetImageSize" and shift["height"] == [shift["width"][0], 1]
    canvas = source(graph, size["inputs"]["image"])["class_type"]
    assert canvas == ("ImageStitch" if mode == "spatial" else "ImageScaleToTotalPixels")


def test_edit_leaves_the_pixels_and_gives_no_mask() -> None:
    graph = dict(graphs())["edit"]
    (condition,) = nodes_of(graph, "InstructPixToPixConditioning")
    assert source(graph, condition["pixels"])["class_type"] == "ImageScaleToTotalPixels"
    (sampler,) = nodes_of(graph, "KSampler")
    assert source(graph, sampler["latent_image"])["class_type"] == "InstructPixToPixConditioning"
    assert not nodes_of(graph, "InpaintModelConditioning") and not nodes_of(graph, "SetLatentNoiseMask")


def test_region_edit_adds_the_mask_to_the_latent() -> None:
    graph = dict(graphs())["edit_region"]
    assert nodes_of(graph, "InstructPixToPixConditioning") and not nodes_of(graph, "InpaintModelConditioning")
    (sampler,) = nodes_of(graph, "KSampler")
    latent = source(graph, sampler["latent_image"])
    assert latent["class_type"] == "SetLatentNoiseMask"
    assert source(graph, latent["inputs"]["mask"])["class_type"] == "LoadImage"


@pytest.mark.parametrize("mode", ["edit, black mask", "mask", "spatial"])
def test_masked_modes_blank_the_pixels_and_denoise_the_whole_picture(mode: str) -> None:
    graph = dict(graphs())[mode]
    (condition,) = nodes_of(graph, "InpaintModelConditioning")
    assert condition["noise_mask"] is False
    mask = source(graph, condition["mask"])
    if mode == "mask":
        assert mask["class_type"] == "LoadImage" and condition["mask"][1] == 1
    else:
        picture = source(graph, mask["inputs"]["image"])
        colours = [picture] if mode != "spatial" else [source(graph, picture["inputs"][f"image{i}"]) for i in (1, 2)]
        assert [node["inputs"]["color"] for node in colours] == ([0, 0xFFFFFF] if mode == "spatial" else [0])


def test_spatial_crops_the_right_half() -> None:
    graph = dict(graphs())["spatial"]
    (crop,) = nodes_of(graph, "ImageCrop")
    assert crop["x"] == crop["width"] and crop["y"] == 0
    assert source(graph, source(graph, crop["width"])["inputs"]["image"])["class_type"] == "ImageScaleToTotalPixels"
    (save,) = nodes_of(graph, "SaveImage")
    assert source(graph, save["images"])["class_type"] == "ImageCrop"


@pytest.mark.parametrize("mode", ["edit, black mask", *MODES])
def test_ui_format_says_the_same_graph(mode: str) -> None:
    graph = dict(graphs())[mode]
    ui, api = graph.for_ui(), graph.for_api()
    links = {link[0]: link for link in ui["links"]}
    for node in ui["nodes"]:
        inputs = api[str(node["id"])]["inputs"]
        for slot, socket in enumerate(node["inputs"]):
            number, origin, output, target, at, kind = links[socket["link"]]
            assert (target, at, kind) == (node["id"], slot, socket["type"])
            assert inputs[socket["name"]] == [str(origin), output]
        widgets = [name for name, kind in NODES[node["type"]].inputs.items() if kind in WIDGET_TYPES]
        plain = [inputs[name] for name in widgets if not isinstance(inputs[name], list)]
        assert [value for value in node["widgets_values"] if value in plain] or not plain
        for output in node["outputs"]:
            assert all(links[number][1:3] == [node["id"], output["slot_index"]] for number in output["links"])
    assert len(links) == sum(isinstance(v, list) for node in api.values() for v in node["inputs"].values())


def test_files_stand_beside_the_network(tmp_path) -> None:
    network = tmp_path / "net.safetensors"
    written, refused = write_workflows(network, described())
    assert [path.name for path in written] == ["net_workflow.json", "net_workflow_api.json"] and not refused
    assert json.loads(written[0].read_text())["version"] == 0.4
    written, refused = write_workflows(network, described(modes=("mask", "spatial")))
    assert [path.name for path in written][::2] == ["net_mask_workflow.json", "net_spatial_workflow.json"]
    write_workflows(network, described(edits_regions=True))
    assert "SetLatentNoiseMask" in (tmp_path / "net_workflow_api.json").read_text()
    written, refused = write_workflows(network, described(edit_mask_value=0.5))
    assert not written and "0.5" in refused[0]
