"""The files: names and hashes as other programs expect them, equal bytes for equal runs, and diffusers loads them."""

import base64
import copy
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from library.errors import NetworkFileError
from library.networks import names
from library.networks.change import Change
from library.networks.factors import exact_lora, lora
from library.networks.file import layouts, save_network, write_network
from library.networks.loading import load_network
from library.networks.metadata import TIME_FIELDS, Description, describe, guide, thumbnail, trained_scale
from tests.networks.support import both, diffusers_output, inputs, network_on, relative

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = Description(
    output_name="circles", modes=("edit",), edit_mask_value=1.0, train_guidance=1.0, sample_guidance=30.0,
    resolution=(512, 384), network_dim=4, steps=10, seed=7, resolved_toml="[network]\nnetwork_dim = 4\n",
    trigger_words=("filled",), extra={"ss_learning_rate": 1e-4, "ss_tag_frequency": {"set": {"a": 1}}},
)  # fmt: skip


def saved(tmp_path, ours, *, format: str = "kohya", dtype=torch.float32, description=DESCRIPTION, **table):
    network = network_on(ours, **table)
    expected = ours(**inputs())
    files = save_network(tmp_path / "net.safetensors", network.export(), description, format=format, dtype=dtype)
    network.detach()
    return expected, files


@pytest.mark.parametrize("format", ["kohya", "diffusers", "both"])
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize(
    "table",
    [
        {},
        {"network_targets": "reference"},
        {"train_x_embedder": True},
        {"network_targets": "all-linear"},
        {"lora_layers": ("attn.to_q", "attn.to_v")},
    ],
)
def test_what_is_saved_is_what_was_trained(tmp_path, format: str, layout: str, table: dict) -> None:
    ours, _ = both(tmp_path / "base")
    expected, files = saved(tmp_path, ours, format=format, network_layout=layout, network_alpha=2.0, **table)
    top_level = table.get("train_x_embedder") or table.get("network_targets") == "all-linear"
    assert len(files) == (2 if format == "both" or (format == "kohya" and top_level) else 1)
    for file in files:
        applied = load_network(file).apply(ours)
        assert relative(ours(**inputs()), expected) < 1e-5, file
        applied.remove()
    assert all(linear.adapter is None for linear in ours.linears().values())


def test_kohya_keys_are_complete_and_of_one_rank(tmp_path) -> None:
    ours, _ = both(tmp_path / "base")
    _, (file,) = saved(tmp_path, ours, dtype=torch.bfloat16, network_dim=4, network_alpha=8.0)
    tensors = load_file(file)
    stems = {key.rsplit(".", 2)[0] if key.endswith("weight") else key.removesuffix(".alpha") for key in tensors}
    assert len(tensors) == 3 * len(stems) == 3 * (2 * 8 + 2 * 2)
    for stem in stems:
        assert stem.startswith("lora_unet_")
        alpha, down, up = (tensors[f"{stem}.{name}"] for name in ("alpha", "lora_down.weight", "lora_up.weight"))
        assert alpha.ndim == 0 and alpha.dtype == torch.float32
        assert down.shape[0] == up.shape[1] == float(alpha) == 4
        assert down.dtype == up.dtype == torch.bfloat16
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 32, 4)


def test_split_network_becomes_an_exact_block_diagonal(tmp_path) -> None:
    ours, _ = both(tmp_path / "base")
    _, (file,) = saved(tmp_path, ours, network_dim=4, network_layout="split")
    tensors = load_file(file)
    for stem, rank in (
        ("double_blocks_0_img_attn_qkv", 12),
        ("single_blocks_1_linear1", 16),
        ("single_blocks_1_linear2", 4),
    ):
        assert tensors[f"lora_unet_{stem}.lora_down.weight"].shape[0] == rank
        assert float(tensors[f"lora_unet_{stem}.alpha"]) == rank
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert torch.count_nonzero(up[:32, 4:]) == torch.count_nonzero(up[32:64, :4]) == 0
    back = layouts(tmp_path / "x.safetensors", load_network(file).change, "diffusers", torch.float32)[0][1]
    assert {tensor.shape[0] for key, tensor in back.items() if key.endswith("lora_A.weight")} == {4}


def test_x_embedder_travels_exactly(tmp_path) -> None:
    ours, _ = both(tmp_path / "base")
    network = network_on(ours, train_x_embedder=True)
    change = network.by_path["img_in"].change.detach().clone()
    first, second = save_network(tmp_path / "net.safetensors", network.export(), DESCRIPTION, dtype=torch.float32)
    assert second.name == "net_diffusers.safetensors"
    kohya, peft = load_file(first), load_file(second)
    # The tiny base is narrower (32) than its input (384), so the identity sits on the other side than at full width.
    product = kohya["lora_unet_img_in.lora_up.weight"] @ kohya["lora_unet_img_in.lora_down.weight"]
    assert torch.equal(product, change)
    assert float(kohya["lora_unet_img_in.alpha"]) == kohya["lora_unet_img_in.lora_down.weight"].shape[0]
    assert torch.equal(
        peft["transformer.x_embedder.lora_B.weight"] @ peft["transformer.x_embedder.lora_A.weight"], change
    )
    assert not any(".diff" in key for key in (*kohya, *peft))


def test_x_embedder_factors_are_the_identity_and_the_change_at_full_width() -> None:
    delta = torch.randn(3072, 384)
    factors = exact_lora(delta)
    assert torch.equal(factors.tensors["lora_down.weight"], torch.eye(384))
    assert torch.equal(factors.tensors["lora_up.weight"], delta)
    assert factors.rank == 384


@pytest.mark.parametrize("table", [{}, {"train_x_embedder": True}, {"network_targets": "all-linear"},
                                   {"network_layout": "split"}, {"network_targets": "reference"}])  # fmt: skip
def test_diffusers_pipeline_loads_the_peft_file(tmp_path, table: dict) -> None:
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    ours, _ = both(tmp_path / "base")
    expected, files = saved(tmp_path, ours, format="both", network_alpha=2.0, **table)
    before = diffusers_output(pipe.transformer, inputs())
    pipe.load_lora_weights(str(files[1].parent), weight_name=files[1].name)
    trained = {key.rsplit(".lora_A", 1)[0] for key in load_file(files[1]) if "lora_A" in key}
    assert len([n for n, _ in pipe.transformer.named_modules() if n.endswith("lora_A")]) == len(trained)
    assert relative(diffusers_output(pipe.transformer, inputs()), expected) < 1e-5
    assert relative(before, expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("table", [{}, {"network_layout": "split"}])
def test_diffusers_pipeline_loads_the_kohya_file_at_full_width(tmp_path, table: dict) -> None:
    """diffusers' conversion of kohya files hard-codes FLUX's width and depth, so the toy is wide and shallow."""
    from diffusers.loaders import FluxLoraLoaderMixin

    shape = {"heads": 24, "head_dim": 128, "double": 1, "single": 1, "axes": (16, 56, 56)}
    ours, theirs = both(tmp_path / "base", **shape)
    expected, (file,) = saved(tmp_path, ours, network_alpha=2.0, **table)
    del ours
    state = FluxLoraLoaderMixin.lora_state_dict(str(file.parent), weight_name=file.name)
    state = {key: value for key, value in state.items() if "lora" in key}
    assert all(key.startswith("transformer.") for key in state)
    FluxLoraLoaderMixin.load_lora_into_transformer(state, None, theirs)
    assert relative(diffusers_output(theirs, inputs()), expected) < 1e-5


def test_hashes_are_over_the_written_bytes(tmp_path) -> None:
    ours, _ = both(tmp_path / "base")
    _, (file,) = saved(tmp_path, ours)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    digest = hashlib.sha256(raw[8 + length :]).hexdigest()
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert length % 8 == 0
    with safe_open(file, "pt") as handle:
        assert set(handle.keys()) == set(load_file(file))


def test_legacy_hash_is_kohyas(tmp_path) -> None:
    """kohya hashes 64 KiB at 1 MiB of the file as serialised with the ss_ metadata alone."""
    tensors = {f"lora_unet_img_in.part{i}": torch.randn(512, 384) for i in range(3)}
    write_network(tmp_path / "big.safetensors", tensors, {"ss_one": "1", "modelspec.title": "x"})
    with safe_open(tmp_path / "big.safetensors", "pt") as handle:
        written = handle.metadata()["sshs_legacy_hash"]
    serialised = save(tensors, {"ss_one": "1"})
    assert written == hashlib.sha256(serialised[0x100000:0x110000]).hexdigest()[:8]
    write_network(tmp_path / "small.safetensors", {"a": torch.zeros(3)}, {})
    with safe_open(tmp_path / "small.safetensors", "pt") as handle:
        assert handle.metadata()["sshs_legacy_hash"] == "e3b0c442"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_network(tmp_path / "net.safetensors", {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def made_up_file(path: str) -> None:
    """A file whose every byte should depend on its content alone; also run in a process of its own."""
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=draw), torch.randn(96, 4, generator=draw)
    modules = [f"double_blocks.{i}.img_attn.qkv" for i in range(4)]
    change = Change({(m, (0, 96)): lora(down, up) for m in modules}, {m: (96, 32) for m in modules})
    save_network(path, change, Description("n", modes=("edit", "mask"), tags=("a", "b"), steps=3))


def test_equal_runs_give_equal_files(tmp_path, monkeypatch) -> None:
    here, there, later = (tmp_path / f"{name}.safetensors" for name in ("here", "there", "later"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made_up_file(here)
    script = "import sys; from tests.networks.test_file import made_up_file; made_up_file(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, str(there)], check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "5"}
    )
    assert here.read_bytes() == there.read_bytes()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    made_up_file(later)
    metadata = []
    for file in (here, later):
        with safe_open(file, "pt") as handle:
            metadata.append(handle.metadata())
    assert metadata[0].keys() == metadata[1].keys()
    assert {name for name in metadata[0] if metadata[0][name] != metadata[1][name]} <= set(TIME_FIELDS)
    assert metadata[0]["modelspec.date"] == "2023-11-14T22:13:20"


def test_metadata_says_what_programs_and_inference_read() -> None:
    written = describe(DESCRIPTION)
    assert all(isinstance(value, str) for value in written.values())
    assert written["ss_output_name"] == "circles"
    assert written["ss_base_model_version"] == "flux1"
    assert written["modelspec.architecture"] == "flux-1-dev/lora"
    assert written["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert "Fill" in written["modelspec.title"] and "Fill" in written["modelspec.usage_hint"]
    assert written["modelspec.trigger_phrase"] == "filled"
    assert json.loads(written["ss_tag_frequency"]) == {"set": {"a": 1}}
    float(written["ss_training_started_at"])
    assert "network_dim = 4" in written["influx_config"]
    assert "lora_adapter_metadata" not in written
    said = guide(written)
    assert (said.modes, said.edit_mask_value, said.sample_guidance) == (("edit",), 1.0, 30.0)
    assert said.resolution == (512, 384)
    minimal = describe(DESCRIPTION, minimal=True)
    assert guide(minimal) == said
    assert "influx_config" not in minimal and "modelspec.title" not in minimal


def test_preview_picture_is_small_and_whole(tmp_path) -> None:
    Image.effect_noise((2000, 1000), 90).save(tmp_path / "p.png")
    url = thumbnail(tmp_path / "p.png")
    written = describe(Description("x", thumbnail=url))
    head, _, data = written["modelspec.thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64" and json.loads(written["ssmd_cover_images"]) == [data]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (384, 192)
    assert sum(map(len, written.values())) < 2**19


def test_guide_of_a_foreign_file_is_empty() -> None:
    said = guide({"influx_modes": "not json", "influx_resolution": "wide", "influx_sample_guidance": "much"})
    assert said == guide({})


def test_trained_scales_are_kept(tmp_path) -> None:
    ours, _ = both(tmp_path / "base")
    network = network_on(ours, network_dim=4, network_alpha=8.0, network_reg_alphas=("linear2=3",))
    scales = network.trained_scales()
    metadata = describe(Description("x", trained_scales=scales))
    for module, scale in scales.items():
        assert trained_scale(metadata, module, 1) == scale == (0.75 if "linear2" in module else 2.0)
    assert trained_scale({"influx_trained_alpha": '{"": 8, "linear2": 3}'}, "linear2", 4) == 0.75
    assert trained_scale({}, "linear2", 4) is None


def test_nothing_non_finite_is_written(tmp_path) -> None:
    with pytest.raises(NetworkFileError, match="NaN"):
        write_network(tmp_path / "net.safetensors", {"a": torch.tensor([1.0, float("nan")])}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strengths", [(0.5, 0.0), (1.0, 1.0), (-0.7, 1.3)])
def test_several_networks_add_up_with_their_strengths(tmp_path, strengths: tuple[float, float]) -> None:
    from library.networks.loading import apply_networks, merge_networks

    ours, _ = both(tmp_path / "base")
    networks = []
    for number, table in enumerate(({}, {"network_targets": "reference", "train_x_embedder": True})):
        network = network_on(ours, seed=number, **table)
        path = tmp_path / f"{number}.safetensors"
        save_network(path, network.export(), DESCRIPTION, dtype=torch.float32)
        networks.append(load_network(path))
        network.detach()
    merged = copy.deepcopy(ours)
    applied = apply_networks(ours, list(zip(networks, strengths)))
    merge_networks(merged, list(zip(networks, strengths)))
    assert relative(ours(**inputs()), merged(**inputs())) < 1e-5
    applied.remove()
    if strengths == (0.5, 0.0):
        networks[0].apply(ours, 0.5)
        assert relative(ours(**inputs()), merged(**inputs())) < 1e-5


def spelt(tensors: dict, rename) -> dict:
    return {rename(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.removeprefix("transformer."),
        lambda key: key.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
        lambda key: _onetrainer(key),
    ],
    ids=["ai-toolkit", "bare", "peft", "onetrainer"],
)
def test_other_trainers_spellings_are_read(tmp_path, rename) -> None:
    from safetensors.torch import save_file

    ours, _ = both(tmp_path / "base")
    expected, (file,) = saved(tmp_path, ours, format="diffusers")
    save_file(spelt(load_file(file), rename), tmp_path / "other.safetensors")
    load_network(tmp_path / "other.safetensors").apply(ours)
    assert relative(ours(**inputs()), expected) < 1e-5


def _onetrainer(key: str) -> str:
    stem, suffix = names.split_suffix(key)
    suffix = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(suffix, suffix)
    return "lora_transformer_" + stem.removeprefix("transformer.").replace(".", "_") + "." + suffix


def test_bfl_dotted_names_are_read(tmp_path) -> None:
    from safetensors.torch import save_file

    ours, _ = both(tmp_path / "base")
    expected, (file,) = saved(tmp_path, ours)
    tensors = {}
    for key, tensor in load_file(file).items():
        meaning = names.parse(key)
        tensors[f"diffusion_model.{meaning.place.module}.{meaning.tensor}"] = tensor
    save_file(tensors, tmp_path / "bfl.safetensors")
    load_network(tmp_path / "bfl.safetensors").apply(ours)
    assert relative(ours(**inputs()), expected) < 1e-5


def broken(tensors: dict, how: str) -> dict:
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    if how == "foreign key":
        tensors["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"] = torch.zeros(4, 4)
    elif how == "missing half":
        del tensors[f"{stem}.lora_up.weight"]
    elif how == "too deep":
        tensors |= {
            key.replace("blocks_0_img_mlp_0", "blocks_9_img_mlp_0"): t.clone()
            for key, t in tensors.items()
            if stem in key
        }
    elif how == "wrong width":
        tensors["lora_unet_img_in.lora_down.weight"] = torch.zeros(4, 64)
        tensors["lora_unet_img_in.lora_up.weight"] = torch.zeros(32, 4)
    elif how == "nan":
        tensors[f"{stem}.lora_up.weight"][0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("foreign key", "input_blocks"),
        ("missing half", "double_blocks.0.img_mlp.0"),
        ("too deep", "deeper FLUX"),
        ("wrong width", "64 input channels"),
        ("nan", "NaN"),
    ],
)
def test_what_cannot_be_applied_whole_is_refused(tmp_path, how: str, says: str) -> None:
    from safetensors.torch import save_file

    ours, _ = both(tmp_path / "base")
    _, (file,) = saved(tmp_path, ours)
    save_file(broken(load_file(file), how), tmp_path / "bad.safetensors")
    with pytest.raises(NetworkFileError, match=says):
        load_network(tmp_path / "bad.safetensors").apply(ours)


def test_pickles_and_missing_files_are_refused(tmp_path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pt")
    with pytest.raises(NetworkFileError, match="pickle"):
        load_network(tmp_path / "net.pt")
    with pytest.raises(NetworkFileError, match="no network file"):
        load_network(tmp_path / "none.safetensors")
