"""The memory forecast: exact where it can be, close to fake-tensor runs where it is fitted; and a planner that fits."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.counters import count, fake_tensors
from library.config.run import Run
from library.config.tables import DatasetTable, MemoryTable, NetworkTable, OptimizerTable, SubsetTable, TrainingTable
from library.errors import ConfigError
from library.flow.packing import image_ids
from library.forecast import inference_lines, largest_bucket, painting_of, settle, training_lines, work_of
from library.memory.offload import InHostMemory
from library.memory.precision import QUANTISED, STORAGES, is_quantised
from library.models import budget, cost
from library.models.cost import CARDS, GB, REFERENCE_CARD, Setting, Work
from library.models.keymap import entries
from library.models.load import Residence, load_transformer
from library.models.shape import FluxShape
from library.networks import build

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FULL = FluxShape()
SHALLOW = FluxShape(double_blocks=1, single_blocks=2)


class ShapesOnly:
    """A checkpoint without values, already in the precision it is wanted in."""

    def __init__(self, shape: FluxShape, precision: str = "bf16"):
        self.shape, self.entries, self.precision = shape, entries(shape), precision

    def read(self, entry) -> torch.Tensor:
        return torch.empty(entry.shape, dtype=torch.bfloat16)

    def read_encoded(self, entry) -> dict[str, torch.Tensor] | None:
        path, _, leaf = entry.name.rpartition(".")
        if self.precision not in QUANTISED or leaf != "weight" or not is_quantised(path):
            return None
        layout = STORAGES[self.precision].layout(entry.shape, torch.bfloat16)
        return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in layout.items()}


def work(pixels: int = 512, **other) -> Work:
    given = {"trained": 40_000_000, "rank": 16, "optimizer": "AdamW8bit", "batch": 1, "text": 512}
    return Work(**{**given, "width": pixels, "height": pixels, **other})


def fake_step(setting: Setting, step: Work, arithmetic: bool = False) -> float:
    """Peak bytes of activations in one fake step of a shallow full-width model."""
    with fake_tensors():
        residence = Residence(setting.precision, arithmetic, blocks_to_swap=setting.blocks_to_swap)
        model = load_transformer(ShapesOnly(SHALLOW, setting.precision), dtype=torch.bfloat16, residence=residence)
        model.runner.checkpointing = setting.checkpointing
        if setting.offload:
            model.runner.keeper = InHostMemory(torch.device("cpu"))
        parameters = build(NetworkTable(network_dim=step.rank), model).attach()
        height, width = step.height // 8, step.width // 8
        draw = lambda *size: torch.empty(step.batch, *size, dtype=torch.bfloat16)
        given = {
            "tokens": draw(height * width // 4, 384), "text": draw(step.text, 4096), "pooled": draw(768),
            "timestep": torch.empty(step.batch), "guidance": torch.empty(step.batch),
            "image_ids": image_ids(height, width),
        }  # fmt: skip
        model._rotation_table(given["image_ids"])
        counts = count(lambda: model(**given).float().square().mean().backward(), parameters)
    return counts.peak_gb * GB


@pytest.mark.parametrize(
    ("setting", "step"),
    [
        (Setting("bf16"), work(512)),
        (Setting("bf16"), work(1024, rank=64)),
        (Setting("bf16"), work(512, batch=3, text=256)),
        (Setting("bf16", checkpointing=False), work(512)),
        (Setting("bf16", checkpointing=False), work(768, batch=2)),
        (Setting("int8"), work(1024)),
        (Setting("fp8", blocks_to_swap=3), work(1024)),
    ],
)
def test_activations_are_those_of_a_fake_step(setting, step) -> None:
    base = cost.weights(SHALLOW, setting)
    forecast = cost.activations(SHALLOW, setting, step) + cost.dequantised(setting, base)
    assert 0.95 < forecast / fake_step(setting, step) < 1.15


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("pixels", [512, 1024])
def test_quantised_activations_need_no_more(precision, pixels) -> None:
    setting, step = Setting(precision), work(pixels)
    forecast = cost.activations(SHALLOW, setting, step) + cost.dequantised(setting, cost.weights(SHALLOW, setting))
    assert fake_step(setting, step, arithmetic=True) <= forecast


@pytest.mark.parametrize("pixels", [512, 1024])
def test_activations_are_those_of_the_whole_model(pixels: int) -> None:
    """Against the full-size fake run that `python -m benchmarks.counters` recorded: 19 + 38 blocks, rank 16."""
    recorded = json.loads((RESULTS / f"counters_{pixels}.json").read_text(encoding="utf-8"))
    assert (recorded["double"], recorded["single"]) == (FULL.double_blocks, FULL.single_blocks)
    forecast = cost.activations(FULL, Setting("bf16"), work(pixels)) / GB
    assert forecast == pytest.approx(recorded["arms"]["influx"]["peak_gb"], rel=0.02)


def test_offloaded_checkpoints_leave_the_device() -> None:
    unit = 3072 * 2 * work(1024).tokens
    for deep in (FULL, SHALLOW):
        blocks = deep.double_blocks + deep.single_blocks
        kept = cost.activations(deep, Setting(), work(1024)) - cost.activations(deep, Setting(offload=True), work(1024))
        assert kept == pytest.approx((blocks - 3) * unit, abs=1)


@pytest.mark.parametrize(
    ("precision", "gigabytes"),
    [
        ("bf16", 23.80),
        ("int8", 11.98),
        ("fp8", 11.98),
        ("nf4", 6.24),
    ],
)
def test_weights_of_flux_fill(precision, gigabytes) -> None:
    assert cost.weights(FULL, Setting(precision)).total / GB == pytest.approx(gigabytes, abs=0.02)
    assert cost.weights(FULL, Setting("bf16")).modulation == 2 * 3_227_516_928


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "nf4"])
def test_weights_are_what_loading_allocates(precision) -> None:
    setting = Setting(precision)
    with fake_tensors():
        model = load_transformer(ShapesOnly(SHALLOW, precision), dtype=torch.bfloat16, residence=Residence(precision))
        stored = sum(linear.storage.num_bytes for linear in model.linears().values() if linear.storage is not None)
        plain = sum(parameter.nbytes for parameter in model.parameters())
    assert cost.weights(SHALLOW, setting).total == pytest.approx(stored + plain, rel=1e-3)


def test_flops_are_the_counted_ones() -> None:
    from benchmarks.counters import Step, influx

    counted = influx(Step(SHALLOW)).tflop
    assert cost.step_flops(SHALLOW, Setting(), work()) / 1e12 == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("setting", "pixels", "reserved"),
    [
        (Setting("int8", 57, 2, True, True, True), 512, 2.4),
        (Setting("int8", 57, 2, True, True, True), 1024, 3.2),
        (Setting("nf4", 0, 2, True, True, False), 512, 6.7),
    ],
)
def test_the_targets_for_small_cards(setting, pixels, reserved) -> None:
    needed = cost.training_vram(FULL, setting, work(pixels)).total - cost.CUDA_CONTEXT
    assert needed / GB <= reserved


@pytest.mark.parametrize("vram", [4, 6, 8, 12, 16, 24, 48])
@pytest.mark.parametrize("pixels", [512, 1024])
def test_a_budget_is_kept(vram, pixels) -> None:
    table = MemoryTable(vram_budget_gb=vram, ram_budget_gb=24)
    choice = budget.choose(FULL, table, work(pixels))
    assert choice.vram <= vram * GB and choice.ram <= 24 * GB
    again = MemoryTable(**choice.values(57))
    assert budget.setting_of(again, FULL, "bf16") == choice.setting


def test_more_memory_is_never_slower_or_worse() -> None:
    seconds = [budget.choose(FULL, MemoryTable(vram_budget_gb=v), work(512)).seconds for v in (4, 8, 16, 40)]
    assert seconds == sorted(seconds, reverse=True)
    precisions = [budget.choose(FULL, MemoryTable(vram_budget_gb=v), work()).setting.precision for v in (8, 24, 40)]
    assert precisions == ["int8", "bf16", "bf16"]


def test_little_ram_streams_nf4() -> None:
    choice = budget.choose(FULL, MemoryTable(vram_budget_gb=4, ram_budget_gb=10), work(512))
    assert choice.setting.precision == "nf4" and choice.ram <= 10 * GB


def test_keys_of_the_user_stay() -> None:
    table = MemoryTable(vram_budget_gb=8, base_precision="fp8", modulation_on_cpu=False, gradient_checkpointing=True)
    setting = budget.choose(FULL, table, work(512)).setting
    assert (setting.precision, setting.modulation_on_cpu, setting.checkpointing) == ("fp8", False, True)
    table = MemoryTable(vram_budget_gb=40, base_precision="bf16", blocks_to_swap=5)
    assert budget.choose(FULL, table, work(512)).setting.blocks_to_swap == 5


def test_what_cannot_fit_names_the_nearest_that_can() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits 1024 x 1024, batch 1.*blocks_to_swap = \"all\".*would fit"):
        budget.choose(FULL, MemoryTable(vram_budget_gb=1.8), work(1024))
    with pytest.raises(ConfigError, match=r"ram_budget_gb = 4: nothing fits"):
        budget.choose(FULL, MemoryTable(vram_budget_gb=3, ram_budget_gb=4), work(512))


def test_streaming_is_hidden_on_slow_cards_and_binds_fast_ones() -> None:
    streamed, resident = Setting("int8", 57, 2, True), Setting("int8", 0, 2, True)
    slow, fast = REFERENCE_CARD, next(card for card in CARDS if card.name == "H100")
    assert cost.step_seconds(FULL, streamed, work(), slow) == cost.step_seconds(FULL, resident, work(), slow)
    assert cost.step_seconds(FULL, streamed, work(), fast) > 2 * cost.step_seconds(FULL, resident, work(), fast)
    assert cost.crossing_bytes(FULL, streamed, work()) / GB == pytest.approx(17.2, abs=0.05)


def test_cards_by_the_drivers_name() -> None:
    assert cost.card_named("NVIDIA GeForce RTX 3060 Laptop GPU").name == "RTX 3060"
    assert cost.card_named("NVIDIA H100 80GB HBM3").name == "H100" and cost.card_named("Radeon") is None


def example(**memory) -> Run:
    subset = SubsetTable(image_dir="a", target_dir="b", mode="edit")
    return Run(
        name="train", memory=MemoryTable(**memory), network=NetworkTable(network_dim=32),
        datasets=(DatasetTable(resolution=768, train_batch_size=2, subsets=(subset,)),),
        optimizer=OptimizerTable(optimizer_type="AdamW8bit"),
        training=TrainingTable(max_train_steps=1000, mixed_precision="bf16"),
    )  # fmt: skip


def test_forecast_of_a_configuration() -> None:
    run = example(vram_budget_gb=12)
    settled, lines = settle(run, FULL, REFERENCE_CARD)
    assert settled.memory.base_precision == "int8" and lines[1] == "[memory]"
    text = "\n".join(training_lines(run, FULL, work_of(run, FULL), card=REFERENCE_CARD))
    assert 'base_precision = "int8"' in text and "An estimate" in text and "RAM:" in text and "disk:" in text
    assert settle(example(), FULL) == (example(), [])
    painting = painting_of(example(), [(1024, 1024)], 1)
    text = "\n".join(inference_lines(example(), FULL, painting, 1, [(1024, 1024)], {Path("a.png"): (1000, 1000)}))
    assert "VRAM" in text and "RAM" in text and "disk" in text and "s per picture" in text
    toy = FluxShape(hidden=128, heads=4, mlp=512, double_blocks=1, single_blocks=1, axes_dim=(4, 14, 14))
    assert "not estimated" in training_lines(example(), toy, work_of(example(), toy))[-1]


def test_trained_parameters_are_counted_as_built() -> None:
    shape = FluxShape(
        hidden=32, heads=2, mlp=128, double_blocks=2, single_blocks=1, text_width=32, pooled_width=32,
        axes_dim=(4, 6, 6),
    )  # fmt: skip
    for table in (NetworkTable(network_dim=4), NetworkTable(network_dim=4, network_layout="split")):
        model = load_transformer(ShapesOnly(shape))
        trained = sum(parameter.numel() for parameter in build(table, model).attach())
        assert work_of(example().model_copy(update={"network": table}), shape).trained == trained


def test_the_largest_bucket_counts_batch_and_canvas() -> None:
    edit = example().datasets[0]
    width, height, batch = largest_bucket((edit,))
    assert batch == 2 and 0.9 < width * height / 768**2 < 1.15
    spatial = edit.model_copy(update={"subsets": (SubsetTable(image_dir="a", target_dir="b", mode="spatial"),)})
    assert largest_bucket((edit, spatial))[0] > 1.9 * width
