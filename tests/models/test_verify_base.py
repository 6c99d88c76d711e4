"""The first user's check of real weights: it passes a trained base, fails a broken one, and fits the machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.models import budget, cost
from library.models.base import Base
from library.models.checkpoint_file import TransformerFile
from library.models.cost import GB
from library.models.shape import FluxShape, diffusers_config, shape_of_config
from tests.models.layout_files import scaled
from tests.models.test_gguf import write_gguf
from tests.tiny import tiny_base
from tools import verify_base
from tools.verify import oracle, room
from tools.verify.losses import gaussian_loss

NANO = Path(__file__).resolve().parents[2] / "nano"
FULL = FluxShape()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(base: Path, output: Path, *more: object) -> tuple[int, dict]:
    """Exit code and verify.json of the tool on the drawn circle, which the nano base knows."""
    words = ["--base", base, "--side", 64, "--steps", 4, "--output_dir", output, *more]
    code = verify_base.main([str(word) for word in words])
    return code, json.loads((output / "verify.json").read_text(encoding="utf-8"))


def outcome(content: dict) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in content["checks"]}


def test_the_nano_base_passes(tmp_path, capsys) -> None:
    code, content = run(NANO, tmp_path)
    said = capsys.readouterr().out
    assert code == 0 and content["verdict"] == "everything passed", said
    assert len(outcome(content)) == 5 and all(outcome(content).values())
    assert said.count("  ok\n") == 4 and "to paste into an issue" in said and said.count("```") == 2
    for label in ("machine", "versions", "base", "kept as"):
        assert f"\n{label}" in said and label in content["about"]
    assert {part["name"] for part in content["parts"]} >= {"text encoders", "inpaint in 4 steps", "VAE decoder"}
    grid = Image.open(tmp_path / "verify.png")
    assert grid.size[0] > 3 * 64 and grid.size[1] > 64


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_it_passes_in_every_precision_streamed(tmp_path, precision) -> None:
    keys = ["--base_precision", precision, "--blocks_to_swap", "all", "--modulation_on_cpu"]
    code, content = run(NANO, tmp_path, *keys)
    assert code == 0 and f'base_precision = "{precision}", blocks_to_swap = "all"' in content["about"]["kept as"]
    assert 1e-3 < content["checks"][-1]["figures"]["difference"] < oracle.TOLERANCE[precision] / 4


def test_random_weights_are_equal_to_diffusers_but_no_trained_model(tmp_path) -> None:
    code, content = run(tiny_base(tmp_path / "base"), tmp_path)
    assert code == 1 and outcome(content)["loss per sigma"] is False and outcome(content)["VAE round trip"] is False
    assert outcome(content)[verify_base.ORACLE] is True


def zeroed(columns: torch.Tensor) -> torch.Tensor:
    return torch.cat([columns[:, :64], torch.zeros_like(columns[:, 64:])], dim=1)


def mask_before_picture(columns: torch.Tensor) -> torch.Tensor:
    return torch.cat([columns[:, :64], columns[:, 128:], columns[:, 64:128]], dim=1)


def without_mask(columns: torch.Tensor) -> torch.Tensor:
    return torch.cat([columns[:, :128], torch.zeros_like(columns[:, 128:])], dim=1)


def other_packing(columns: torch.Tensor) -> torch.Tensor:
    """As if a latent token held its four places first and its sixteen channels last."""
    picture = columns[:, 64:128].unflatten(1, (16, 4)).transpose(1, 2).flatten(1)
    return torch.cat([columns[:, :64], picture, columns[:, 128:]], dim=1)


@pytest.mark.parametrize("broken", [zeroed, mask_before_picture, without_mask, other_packing])
def test_condition_channels_that_mean_something_else_fail(tmp_path, broken) -> None:
    base = shutil.copytree(NANO, tmp_path / "base")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["x_embedder.weight"] = broken(tensors["x_embedder.weight"]).contiguous()
    save_file(tensors, file)
    code, content = run(base, tmp_path, "--no_diffusers")
    assert code == 1 and outcome(content)["loss per sigma"] is False
    assert outcome(content)[verify_base.ORACLE] is None


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_a_misread_layer_is_outside_every_tolerance(tmp_path, monkeypatch, precision) -> None:
    read = TransformerFile.read

    def misread(file: TransformerFile, entry) -> torch.Tensor:
        """Shift and scale of the last layer exchanged, as if diffusers had BFL's order."""
        tensor = read(file, entry)
        return tensor.roll(len(tensor) // 2, 0) if entry.name.startswith("final_layer.adaLN") else tensor

    monkeypatch.setattr(TransformerFile, "read", misread)
    code, content = run(NANO, tmp_path, "--base_precision", precision)
    assert code == 1 and outcome(content)[verify_base.ORACLE] is False


def bfl_tensors() -> dict[str, torch.Tensor]:
    file = TransformerFile.open(NANO / "transformer")
    return {entry.name: file.read(entry).clone() for entry in file.entries}


@pytest.mark.parametrize(("kind", "reason"), [("scaled", "scaled fp8"), ("gguf", "width 3072"), ("bfl", "width 3072")])
def test_files_that_diffusers_cannot_read_are_skipped_in_words(tmp_path, kind, reason) -> None:
    path = tmp_path / ("fill.gguf" if kind == "gguf" else "fill.safetensors")
    if kind == "gguf":
        write_gguf(path, bfl_tensors(), "Q8_0")
    else:
        save_file(scaled(bfl_tensors(), "", "scale_weight", False)[0] if kind == "scaled" else bfl_tensors(), path)
    code, content = run(NANO, tmp_path, "--transformer", path)
    check = content["checks"][-1]
    assert code == 0 and check["passed"] is None and reason in check["words"]
    assert content["verdict"] == "everything passed, 1 skipped"


def test_single_files_need_room_for_what_diffusers_copies(tmp_path, monkeypatch) -> None:
    save_file(bfl_tensors(), tmp_path / "fill.safetensors")
    file = TransformerFile.open(tmp_path / "fill.safetensors")
    monkeypatch.setattr(oracle, "CONVERTER_WIDTH", file.shape.hidden)
    monkeypatch.setattr(room, "free_ram", lambda: 0.5 * GB)
    with pytest.raises(oracle.Skipped, match="1.0 GB of free RAM"):
        oracle.require_readable(file)


def test_what_was_found_before_memory_ran_out_is_kept(tmp_path, monkeypatch, capsys) -> None:
    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Base, "load_transformer", full)
    code, content = run(NANO, tmp_path)
    assert code == 4 and "load the transformer" in content["stopped"] and "--vram_budget_gb" in content["stopped"]
    assert outcome(content) == {"every tensor accounted for": True, "text encoders and tokenizers": True}
    assert "error: " in capsys.readouterr().err


def test_a_base_that_is_not_there_is_a_message(tmp_path) -> None:
    code, content = run(tmp_path / "nowhere", tmp_path)
    assert code == 2 and "nowhere" in content["stopped"]


CARDS = [(3.5, 12, "nf4"), (5.2, 11, "nf4"), (5.2, 25, "int8"), (7.2, 11, "int8"), (11, 11, "int8"), (23, 50, "bf16")]


@pytest.mark.parametrize(("vram", "ram", "precision"), CARDS)
def test_full_size_is_planned_within_what_is_free(monkeypatch, vram, ram, precision) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (vram * GB, 2 * vram * GB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(room, "free_ram", lambda: ram * GB)
    plan = room.settle(FULL, CUDA, {}, 512, 512)
    setting = budget.setting_of(plan.memory, FULL, "bf16")
    assert plan.predicting().total <= vram * GB and cost.training_ram(FULL, setting, plan.work).total <= ram * GB
    assert (plan.precision, plan.dtype) == (precision, torch.bfloat16)
    assert any("forecast" in line for line in plan.lines())


def test_keys_that_the_user_sets_stay(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    given = {"base_precision": "nf4", "vram_budget_gb": 8.0, "ram_budget_gb": 12.0}
    plan = room.settle(FULL, CUDA, given, 512, 512)
    assert plan.memory.base_precision == "nf4" and plan.device_bytes == 8 * GB
    with pytest.raises(ConfigError, match="nothing fits"):
        room.settle(FULL, CUDA, {**given, "base_precision": "bf16"}, 512, 512)


@pytest.mark.parametrize(("ram", "precision"), [(12, "nf4"), (20, "int8"), (32, "bf16")])
def test_without_a_card_the_ram_decides(monkeypatch, ram, precision) -> None:
    monkeypatch.setattr(room, "free_ram", lambda: ram * GB)
    plan = room.settle(FULL, CPU, {}, 512, 512)
    assert (plan.precision, plan.dtype, plan.memory.blocks_to_swap) == (precision, torch.bfloat16, 0)
    with pytest.raises(ConfigError, match="ram_budget_gb"):
        room.settle(FULL, CPU, {"ram_budget_gb": 6.0}, 512, 512)


def test_toys_stay_whole_in_fp32_on_a_cpu() -> None:
    shape = TransformerFile.open(NANO / "transformer").shape
    plan = room.settle(shape, CPU, {}, 64, 16)
    assert plan.dtype == torch.float32 and plan.memory == MemoryTable() and plan.predicting() is None


def test_the_configuration_for_diffusers_is_that_of_the_shape() -> None:
    assert shape_of_config(diffusers_config(FULL)) == FULL


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
def test_the_bound_is_that_of_the_best_linear_guess(level) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1.7 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    n = torch.randn(200_000, generator=generator, dtype=torch.float64)
    z, v = (1 - level) * x + level * n, n - x
    guess = z * (z @ v) / (z @ z)
    assert gaussian_loss(1.7**2, level) == pytest.approx(float((v - guess).square().mean()), rel=0.02)
