"""The tools for network files, run as a user runs them: what they write is exact, what they lose they say."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.tables.network import NetworkTable
from library.errors import ModelError, NetworkFileError
from library.models.checkpoint_file import TransformerFile
from library.models.load import load_transformer
from library.networks import acceptance, build, surgery
from library.networks.baking import bake
from library.networks.change import Change
from library.networks.file import save_network
from library.networks.loading import LoadedNetwork, apply_networks, load_network, merge_networks
from library.networks.metadata import Description, trained_scale
from tests.networks.comfy_process import write_bfl_checkpoint
from tests.networks.support import both, inputs, network_on, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    both(path)
    return path


@pytest.fixture
def model(folder):
    return load_transformer(TransformerFile.open(folder))


def saved(path: Path, model, *, seed: int = 0, format: str = "kohya", **table):
    """(model's output with the network, the network as loaded from the written file)."""
    network = network_on(model, seed=seed, **table)
    output = model(**inputs())
    files = save_network(path, network.export(), Description(path.stem), format=format, dtype=torch.float32)
    network.detach()
    return output, load_network(files[0])


def with_change(model, change) -> torch.Tensor:
    applied = LoadedNetwork(Path("made"), change, {}).apply(model)
    output = model(**inputs())
    applied.remove()
    return output


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def tool(name: str, *arguments) -> Done:
    """Run `python -m tools.NAME` here: a process of its own would spend its time importing torch."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            runpy.run_module(f"tools.{name}", run_name="__main__")
    finally:
        sys.argv = before
    return Done(ended.value.code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("format", ["kohya", "diffusers", "both"])
def test_convert_keeps_the_network_and_what_it_says(tmp_path, model, format: str) -> None:
    expected, _ = saved(tmp_path / "in.safetensors", model, network_layout="split", train_x_embedder=True)
    done = tool("convert_lora", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--format", format,
                "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.split()]
    assert len(files) == (1 if format == "diffusers" else 2)
    for file in files:
        applied = load_network(file).apply(model)
        assert relative(model(**inputs()), expected) < 1e-5
        applied.remove()
    with safe_open(files[0], "pt") as handle:
        assert handle.metadata()["ss_output_name"] == "out"
        assert handle.metadata()["modelspec.architecture"] == "flux-1-dev/lora"


def test_convert_turns_other_kinds_into_a_lora_or_says_what_to_do(tmp_path, folder, model) -> None:
    expected, _ = saved(tmp_path / "in.safetensors", model, network_module="glora")
    out = tmp_path / "out.safetensors"
    refused = tool("convert_lora", tmp_path / "in.safetensors", out, "--format", "diffusers")
    assert refused.returncode == 2 and "convert to LoRA" in refused.stderr and "Traceback" not in refused.stderr
    done = tool("convert_lora", tmp_path / "in.safetensors", out, "--format", "diffusers", "--rank", 64,
                "--base", folder, "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    load_network(out).apply(model)
    assert relative(model(**inputs()), expected) < 1e-4
    again = tool("convert_lora", tmp_path / "in.safetensors", out)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_as_lora_lose_what_the_svd_says(tmp_path, model, kind: str) -> None:
    _, network = saved(tmp_path / "in.safetensors", model, network_module=kind)
    exact, errors = surgery.resized(network.change, rank=1000)
    assert max(errors.values()) < 1e-5
    assert relative(with_change(model, exact), with_change(model, network.change)) < 1e-4
    smaller, errors = surgery.resized(network.change, rank=2)
    module, slot = "single_blocks.0.linear1", ("single_blocks.0.linear1", (0, 224))
    whole, left = network.change.entries[slot].delta(), smaller.entries[slot].delta()
    assert abs(float((whole - left).norm() / whole.norm()) - errors[module]) < 1e-4


def test_resize_by_rank_and_by_energy(tmp_path, model) -> None:
    _, network = saved(tmp_path / "in.safetensors", model, network_dim=6, train_x_embedder=True)
    for options, bound in ((("--rank", 2), 2), (("--energy", 0.8), 6)):
        out = tmp_path / f"{options[0][2:]}.safetensors"
        done = tool("resize_lora", tmp_path / "in.safetensors", out, *options, "--precision", "fp32")
        assert done.returncode == 0, done.stderr
        change = load_network(out).change
        ranks = {f.rank for (module, _), f in change.entries.items() if module != "img_in"}
        assert max(ranks) <= bound
        for slot, factors in change.entries.items():
            before = network.change.entries[slot].delta()
            kept = 1 - float(((before - factors.delta()).norm() / before.norm()).square())
            if slot[0] == "img_in":
                assert kept > 1 - 1e-6
            elif options[0] == "--energy":
                assert kept >= 0.8 - 1e-4
                values = torch.linalg.svdvals(before).square()
                assert factors.rank == 1 or float(values[: factors.rank - 1].sum() / values.sum()) < 0.8


def test_merged_networks_are_the_weighted_sum(tmp_path, model) -> None:
    _, first = saved(tmp_path / "a.safetensors", model, network_layout="split", train_x_embedder=True)
    _, second = saved(tmp_path / "b.safetensors", model, seed=4, network_targets="reference", network_dim=3)
    both_on = apply_networks(model, [(first, 0.7), (second, -0.4)])
    expected = model(**inputs())
    both_on.remove()
    done = tool("merge_lora", tmp_path / "m.safetensors", f"{tmp_path}/a.safetensors=0.7",
                f"{tmp_path}/b.safetensors=-0.4", "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    load_network(tmp_path / "m.safetensors").apply(model)
    assert relative(model(**inputs()), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bfl", "diffusers", "sharded"])
def test_merging_into_a_checkpoint(tmp_path, folder, model, layout: str, dtype: torch.dtype) -> None:
    _, network = saved(tmp_path / "n.safetensors", model, network_targets="all-linear", network_layout="split")
    base = stored(tmp_path, folder, model, layout, dtype)
    target = tmp_path / ("merged" if base.is_dir() else "merged.safetensors")
    changed = bake(base, target, [(network.change, 1.0)])
    opened = TransformerFile.open(target)
    weights = [name for e in opened.entries if len(e.shape) == 2 for name in opened.names_of(e)]
    assert changed == len(weights)
    merged, plain = load_transformer(opened).state_dict(), load_transformer(TransformerFile.open(base))
    merge_networks(plain, [(network, 1.0)])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(merged[name], tensor.to(dtype).float()), name


def stored(tmp_path: Path, folder: Path, model, layout: str, dtype: torch.dtype) -> Path:
    """The base in one of the layouts and precisions that it is found in."""
    if layout == "bfl":
        tensors = {f"model.diffusion_model.{name}": t.to(dtype) for name, t in model.state_dict().items()}
        save_file(tensors, tmp_path / "bfl.safetensors")
        return tmp_path / "bfl.safetensors"
    from diffusers import FluxTransformer2DModel

    theirs = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="200KB" if layout == "sharded" else "1GB")
    assert layout != "sharded" or len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    return tmp_path / "base"


def test_merging_into_what_cannot_hold_it_is_refused(tmp_path, model) -> None:
    _, network = saved(tmp_path / "n.safetensors", model)
    base = write_bfl_checkpoint(model, tmp_path / "base.safetensors")
    tensors = load_file(base)
    tensors["double_blocks.0.img_mlp.0.weight"] = tensors["double_blocks.0.img_mlp.0.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(ModelError, match="unquantised"):
        bake(tmp_path / "fp8.safetensors", tmp_path / "out.safetensors", [(network.change, 1.0)])
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ModelError, match="nothing is overwritten"):
        bake(base, base, [(network.change, 1.0)])
    del tensors["single_blocks.1.linear1.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"single_blocks\.1\.linear1"):
        bake(tmp_path / "short.safetensors", tmp_path / "out.safetensors", [(network.change, 1.0)])


def test_extract_gives_back_what_was_merged(tmp_path, folder, model) -> None:
    expected, network = saved(tmp_path / "n.safetensors", model, network_dim=4, train_x_embedder=True)
    merge = tool("merge_lora", tmp_path / "tuned", f"{tmp_path}/n.safetensors=1.0", "--base", folder)
    assert merge.returncode == 0, merge.stderr
    done = tool(
        "extract_lora", folder, tmp_path / "tuned", tmp_path / "out.safetensors", "--rank", 4, "--precision", "fp32"
    )
    assert done.returncode == 0, done.stderr
    load_network(tmp_path / "out.safetensors").apply(model)
    assert relative(model(**inputs()), expected) < 1e-4
    shutil.rmtree(tmp_path / "tuned")


def test_show_names_what_the_file_holds(tmp_path, model) -> None:
    saved(tmp_path / "n.safetensors", model, network_dim=5)
    done = tool("show_lora", tmp_path / "n.safetensors")
    assert done.returncode == 0, done.stderr
    for text in ("20 modules", "kohya (60)", "ranks: 5 (20)", "ss_base_model_version = flux1"):
        assert text in done.stdout
    assert "altered" not in done.stdout
    raw = bytearray((tmp_path / "n.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "n.safetensors").write_bytes(raw)
    assert "altered" in tool("show_lora", tmp_path / "n.safetensors").stdout


def test_check_passes_a_sound_file_and_names_each_problem(tmp_path, model) -> None:
    saved(tmp_path / "n.safetensors", model)
    done = tool("check_lora", tmp_path / "n.safetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all 60 keys loaded") == 5
    tensors = load_file(tmp_path / "n.safetensors")
    tensors["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"].zero_()
    tensors["lora_unet_double_blocks_0_img_mlp_2.lora_up.weight"][0, 0] = float("nan")
    tensors["lora_unet_single_blocks_0_linear2.lora_up.weight"] *= 1e4
    tensors["lora_unet_img_in.lora_down.weight"] = torch.randn(4, 64)
    tensors["lora_unet_img_in.lora_up.weight"] = torch.randn(32, 4)
    tensors["lora_unet_img_in.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "bad.safetensors")
    done = tool("check_lora", tmp_path / "bad.safetensors")
    assert done.returncode == 1
    for text in ("all zero", "NaN", "diverging", "384 channels", "dropped silently", "Nunchaku: refuses"):
        assert text in done.stdout, text


def test_tools_refuse_what_is_no_network(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor file")
    for name, more in (("check_lora", ()), ("show_lora", ()), ("convert_lora", (tmp_path / "y.safetensors",))):
        done = tool(name, tmp_path / "x.safetensors", *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "x.safetensors" in done.stderr


def test_resizing_needs_the_base_where_the_change_depends_on_it(tmp_path, model) -> None:
    _, network = saved(tmp_path / "n.safetensors", model, network_module="glora")
    with pytest.raises(NetworkFileError, match="base checkpoint"):
        surgery.resized(network.change, rank=4)


@pytest.mark.parametrize(
    ("program", "lost"),
    [("ComfyUI", 0), ("Forge", 0), ("diffusers", 3), ("kohya", 0), ("Nunchaku", 3)],
)
def test_fates_of_a_trained_x_embedder(tmp_path, model, program: str, lost: int) -> None:
    saved(tmp_path / "n.safetensors", model, train_x_embedder=True)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "n.safetensors").items()}
    found = acceptance.fates(shapes)
    assert len(found.lost(program)) == lost
    assert all("img_in" in key for key in found.lost(program))
    second = {name: tuple(t.shape) for name, t in load_file(tmp_path / "n_diffusers.safetensors").items()}
    for other in ("ComfyUI", "Forge", "diffusers", "Nunchaku"):
        assert acceptance.fates(second).loaded_whole(other), other
    assert not acceptance.fates(second).loaded_whole("kohya")


def with_text(path: Path, network: LoadedNetwork) -> Path:
    """A copy of the network's file that trains a module of CLIP-L too."""
    tensors = load_file(network.path)
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(2.0)}, path)
    return path


def test_clip_is_not_lost_in_a_merge(tmp_path, folder, model) -> None:
    """A checkpoint of the transformer cannot hold it: refused, with the tool that leaves it out, which does."""
    _, network = saved(tmp_path / "n.safetensors", model)
    both_parts = with_text(tmp_path / "both.safetensors", network)
    done = tool("merge_lora", tmp_path / "merged", f"{both_parts}=1.0", "--base", folder)
    assert done.returncode == 2 and "CLIP-L" in done.stderr and "--without_text_encoder" in done.stderr
    assert not (tmp_path / "merged").exists()
    done = tool("convert_lora", both_parts, tmp_path / "alone.safetensors", "--without_text_encoder")
    assert done.returncode == 0, done.stderr
    assert load_network(tmp_path / "alone.safetensors").change.text == {}
    assert tool("merge_lora", tmp_path / "merged", tmp_path / "alone.safetensors", "--base", folder).returncode == 0


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_changes_of_biases_are_merged_too(tmp_path, folder, model, layout: str) -> None:
    """Of whole modules, of parts of fused ones, and with the halves that diffusers exchanges."""
    names = ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1")
    draw = torch.Generator().manual_seed(2)
    biases = {name: torch.randn(model.get_submodule(name).out_features, generator=draw) for name in names}
    change = Change(biases=biases)
    base = stored(tmp_path, folder, model, layout, torch.float32)
    target = tmp_path / ("merged" if base.is_dir() else "merged.safetensors")
    bake(base, target, [(change, 0.5)])
    merged = load_transformer(TransformerFile.open(target)).state_dict()
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        expected = tensor + 0.5 * biases[module] if leaf == "bias" and module in biases else tensor
        torch.testing.assert_close(merged[name], expected, msg=name)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_biases_come_back_from_every_spelling(tmp_path, model, format: str) -> None:
    """Rows, halves and scale: parts of a fused module, lora_B.bias, the exchanged module."""
    names = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1")
    draw = torch.Generator().manual_seed(2)
    biases = {name: torch.randn(model.get_submodule(name).out_features, generator=draw) for name in names}
    (written,) = save_network(
        tmp_path / "b.safetensors", Change(biases=biases), Description("b"), format=format, dtype=torch.float32
    )
    found = load_network(written).change.biases
    assert found.keys() == biases.keys()
    for name, bias in biases.items():
        torch.testing.assert_close(found[name], bias, msg=name)
    stem = "transformer.transformer_blocks.0.attn.to_k"
    save_file(
        {
            f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2),
            f"{stem}.lora_B.bias": torch.ones(32), f"{stem}.alpha": torch.tensor(1.0),
        },
        tmp_path / "peft.safetensors",
    )  # fmt: skip
    (bias,) = load_network(tmp_path / "peft.safetensors").change.biases.values()
    assert bias.tolist() == [0.0] * 32 + [0.5] * 32 + [0.0] * 32


def test_options_that_cannot_act_beside_a_base_are_refused(tmp_path, folder, model) -> None:
    saved(tmp_path / "n.safetensors", model)
    for more in (("--rank", 3), ("--format", "both"), ("--precision", "bf16"), ("--energy", 0.9)):
        done = tool("merge_lora", tmp_path / "m", f"{tmp_path}/n.safetensors=1", "--base", folder, *more)
        assert done.returncode == 2 and more[0] in done.stderr, more
        assert not (tmp_path / "m").exists()


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def described(path: Path, model, description: Description, **table) -> Path:
    network = network_on(model, **table)
    filled = replace(description, trained_scales=network.trained_scales(), network_module=network.module_name)
    save_network(path, network.export(), filled, dtype=torch.float32)
    network.detach()
    return path


def test_a_smaller_network_keeps_its_scale_and_another_kind_does_not(tmp_path, model) -> None:
    """A run that starts from the file takes the steps of the run that made it: alpha would mean another scale."""
    arguments = {"algo": "lokr", "factor": 4}
    source = described(tmp_path / "a.safetensors", model, Description("a"), network_dim=8, network_alpha=4.0)
    for name, more in (("convert_lora", ()), ("resize_lora", ())):
        out = tmp_path / f"{name}.safetensors"
        assert tool(name, source, out, "--rank", 2, *more).returncode == 0
        start = NetworkTable(network_weights=out, dim_from_weights=True)
        network = build(start, model)
        assert {adapter.scale for adapter in network.by_path.values()} == {0.5}
        assert (said(out)["ss_network_dim"], said(out)["ss_network_alpha"]) == ("2", "2")
    old = load_file(source)
    save_file(old, tmp_path / "old.safetensors", {"influx_trained_alpha": '{"": 4.0}'})
    assert tool("convert_lora", tmp_path / "old.safetensors", tmp_path / "o2.safetensors", "--rank", 2).returncode == 0
    assert trained_scale(said(tmp_path / "o2.safetensors"), "img_in", 2) == 0.5
    lokr = described(
        tmp_path / "l.safetensors", model, Description("l", network_args=arguments), network_module="lokr",
        network_alpha=1.0,
    )  # fmt: skip
    assert said(lokr)["ss_network_module"] == "lycoris.kohya" and "influx_trained_scale" in said(lokr)
    assert tool("convert_lora", lokr, tmp_path / "l2.safetensors", "--rank", 2).returncode == 0
    now = said(tmp_path / "l2.safetensors")
    assert now["ss_network_module"] == "networks.lora_flux"
    assert "ss_network_args" not in now and "influx_trained_scale" not in now


def test_a_merged_network_is_for_all_modes_of_its_parts(tmp_path, model) -> None:
    common = {"sample_guidance": 30.0, "edit_mask_value": 1.0}
    a = described(tmp_path / "a.safetensors", model, Description("a", modes=("edit",), resolution=(512, 512), **common))
    b = described(tmp_path / "b.safetensors", model, Description("b", modes=("mask",), resolution=(768, 768), **common))
    done = tool("merge_lora", tmp_path / "m.safetensors", a, b)
    assert done.returncode == 0 and "influx_resolution differs" in done.stdout
    metadata = said(tmp_path / "m.safetensors")
    assert json.loads(metadata["influx_modes"]) == ["edit", "mask"] and "influx_mode" not in metadata
    assert metadata["influx_sample_guidance"] == "30.0" and "influx_resolution" not in metadata
    assert "influx_config" not in metadata


def test_what_needs_the_base_is_made_smaller_with_it(tmp_path, folder, model) -> None:
    expected, _ = saved(tmp_path / "g.safetensors", model, network_module="glora", network_dim=2)
    for name, arguments in (("resize_lora", ("--rank", 4)), ("merge_lora", ())):
        sources = [tmp_path / "g.safetensors", tmp_path / "out.safetensors"]
        done = tool(name, *(sources if name == "resize_lora" else sources[::-1]), *arguments)
        assert done.returncode == 2 and "tools.convert_lora IN OUT" in done.stderr and "--base" in done.stderr
    more = ("--rank", 32, "--base", folder, "--precision", "fp32")
    done = tool("resize_lora", tmp_path / "g.safetensors", tmp_path / "out.safetensors", *more)
    assert done.returncode == 0, done.stderr
    load_network(tmp_path / "out.safetensors").apply(model)
    assert relative(model(**inputs()), expected) < 1e-4
