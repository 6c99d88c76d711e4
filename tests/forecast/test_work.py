"""What a configuration asks for at its worst: batches of several data sets, previews, held-out items, encoding."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library import forecast
from library.config.run import Run
from library.config.tables import (
    CacheTable,
    DatasetTable,
    MemoryTable,
    NetworkTable,
    OptimizerTable,
    SamplingTable,
    SubsetTable,
    TrainingTable,
    ValidationTable,
)
from library.data import cached
from library.forecast import work as counted
from library.forecast.choice import Device, layerwise
from library.models import cost
from library.models.cost import CARDS, REFERENCE_CARD
from library.models.shape import FluxShape

NANO = Path(__file__).resolve().parents[2] / "nano"
FULL = FluxShape()
EDIT = SubsetTable(image_dir="a", target_dir="b", mode="edit")
SPATIAL = EDIT.model_copy(update={"mode": "spatial"})


def configured(*datasets: DatasetTable, subset: SubsetTable = EDIT, **tables) -> Run:
    given = datasets or (DatasetTable(resolution=512, train_batch_size=1, enable_bucket=False, subsets=(subset,)),)
    training = tables.pop("training", TrainingTable(max_train_steps=1000, mixed_precision="bf16"))
    return Run(name="train", datasets=given, training=training, network=NetworkTable(network_dim=16), **tables)


def dataset(resolution: int, batch: int, **more) -> DatasetTable:
    return DatasetTable(resolution=resolution, train_batch_size=batch, enable_bucket=False, subsets=(EDIT,), **more)


def test_of_several_batch_sizes_the_one_with_most_tokens_counts() -> None:
    """Text is part of every sample: four small pictures are more than one of the same area."""
    small, large = dataset(512, 4), dataset(1024, 1)
    assert forecast.largest_bucket((small, large)) == (512, 512, 4)
    assert forecast.largest_bucket((dataset(512, 2), large)) == (1024, 1024, 1)
    assert forecast.work_of(configured(small, large), FULL).batch == 4


def test_a_step_is_told_with_all_that_it_holds() -> None:
    run = configured(
        optimizer=OptimizerTable(optimizer_type="Prodigy", full_bf16=True),
        memory=MemoryTable(optimizer_offload=True),
        training=TrainingTable(mixed_precision="bf16", gradient_accumulation_steps=4, use_ema=True),
    )
    work = forecast.work_of(run, FULL, processes=2)
    assert (work.weight_bytes, work.micro_steps, work.processes, work.optimizer_offload) == (2, 4, 2, True)
    assert work.use_ema and work.ema_on_device
    in_ram = run.with_values("training", "test", ema_cpu=True)
    assert not forecast.work_of(in_ram, FULL).ema_on_device
    alone = forecast.work_of(configured(), FULL)
    with_base = configured().with_values("model", "test", pretrained_model_name_or_path=str(NANO))
    both = forecast.work_of(with_base.with_values("network", "test", train_text_encoder=True), FULL)
    clip = json.loads((NANO / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    values = clip["num_hidden_layers"] * 4 * 2 * clip["hidden_size"]  # q, k, v and out
    assert both.clip == 123_060_480 and both.trained - alone.trained == 16 * values


def shown(subset: SubsetTable = EDIT, **sampling) -> tuple[int, int] | None:
    found = forecast.preview_picture(configured(subset=subset, sampling=SamplingTable(**sampling)))
    return None if found is None else (found.width, found.height)


def test_the_size_of_previews(tmp_path: Path) -> None:
    assert shown() is None
    assert shown(validation_prompt=("x",)) == (512, 512)
    assert shown(SPATIAL, validation_prompt=("x",)) == (1024, 512), "the whole canvas"
    assert shown(validation_prompt=("x",), validation_width=768, validation_height=640) == (768, 640)
    assert shown(SPATIAL, validation_prompt=("x",), validation_width=768, validation_height=384) == (768, 384)
    Image.new("RGB", (300, 150)).save(tmp_path / "wide.png")
    image = tmp_path / "wide.png"
    assert shown(validation_prompt=("x",), validation_width=768, validation_image=(image,)) == (768, 384)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a --w 256 --h 256 --s 7\nb --w 640 --h 512 --s 9\n")
    assert shown(sample_prompts=prompts) == (640, 512)
    found = forecast.preview_picture(configured(sampling=SamplingTable(sample_prompts=prompts)))
    assert found is not None and found.steps == 9
    assert shown(sample_prompts=tmp_path / "gone.txt") == (512, 512), "the cache may have been moved here alone"


def test_previews_are_decoded_as_the_cache_table_says() -> None:
    run = configured(
        sampling=SamplingTable(validation_prompt=("x",)), cache=CacheTable(vae_dtype="bf16", vae_tiling=True)
    )
    found = forecast.preview_picture(run)
    assert found is not None and (found.vae_bytes, found.tiling) == (2, True)


def test_held_out_items() -> None:
    assert counted.HELD_OUT_BATCH == cached.HELD_OUT_BATCH
    assert forecast.work_of(configured(), FULL).held_out is None
    split = dataset(512, 1, validation_split=0.1)
    held_out = forecast.work_of(configured(split), FULL).held_out
    assert held_out is not None and (held_out.batch, held_out.decoded) == (4, False)
    painted = configured(split, validation=ValidationTable(validation_generate=2))
    assert forecast.work_of(painted, FULL).held_out.decoded


def test_training_says_all_of_it() -> None:
    run = configured(sampling=SamplingTable(validation_prompt=("x",)))
    text = "\n".join(forecast.training_lines(run, FULL, forecast.work_of(run, FULL), card=REFERENCE_CARD))
    for words in (
        "largest batch: 1 x 512 x 512 pixels", "VRAM: ", "(largest phase: training step)", "preview, decoding ",
        "optimizer step ", "RAM: ", "disk: ", "s per step, ", "hours for 1000 steps without previews", "An estimate",
    ):  # fmt: skip
        assert words in text, words
    two = forecast.training_lines(run, FULL, forecast.work_of(run, FULL, processes=2), card=REFERENCE_CARD)
    assert any(line.startswith("RAM in each of 2 processes: ") for line in two)


def test_caching_says_all_of_it() -> None:
    run = configured()
    lines = forecast.caching_lines(run, 100, [(512, 512)] * 200, 10**9, 5e10, device=Device(CARDS[1], 12e9))
    text = "\n".join(lines)
    for words in ("VRAM: ", "RAM: ", "captions between its layers", "disk: 1.00 GB to write, 50.0 GB free", "time: "):
        assert words in text, words
    assert "for 100 captions and 44 s for 200 pictures on RTX 3060. An estimate" in text
    whole = forecast.caching_lines(run, 100, [(512, 512)], 0, 0, device=Device(CARDS[8], 25e9))
    assert "captions between its layers" not in "\n".join(whole) and "T5" in "\n".join(whole)
    fresh = forecast.caching_lines(run, 0, [], 0, 0, device=Device())
    assert fresh[0].startswith("VRAM: 0.45 GB")
    painting = forecast.painting_of(run, [(512, 512)] * 4, 4)
    more = forecast.caching_lines(run, 0, [], 0, 0, shape=FULL, class_images=painting, device=Device())
    assert any("class images, denoising" in line for line in more) and "class images not counted" in more[-1]


def test_t5_goes_layer_by_layer_where_card_or_budget_are_small() -> None:
    run = configured()
    assert layerwise(run, Device(None, 12e9)) and not layerwise(run, Device(None, 16e9))
    assert not layerwise(run, Device()), "a CPU holds it whole"
    settled, lines = forecast.settle_encoders(configured(memory=MemoryTable(vram_budget_gb=8)))
    assert settled.cache.t5xxl_layer_by_layer and lines == ["[cache]", "t5xxl_layer_by_layer = true"]
    assert forecast.settle_encoders(configured(memory=MemoryTable(vram_budget_gb=20)))[1] == []
    asked = configured(memory=MemoryTable(vram_budget_gb=8), cache=CacheTable(t5xxl_layer_by_layer=False))
    assert forecast.settle_encoders(asked) == (asked, [])


def test_inference_says_all_of_it_in_phases() -> None:
    run = configured().model_copy(update={"name": "infer"})
    painting = forecast.painting_of(run, [(1024, 512), (512, 512)], 4, steps=28)
    assert painting.preview is not None and painting.preview.batch == 1, "one request has the largest size"
    results = {Path(f"{n}.png"): (1000, 500) for n in range(2)}
    text = "\n".join(
        forecast.inference_lines(run, FULL, painting, 2, [(1024, 512)] * 2, results, device=Device(CARDS[8], 25e9))
    )
    for words in (
        "largest batch: 1 x 1024 x 512 pixels", "VRAM: ", "text encoders ", "condition (VAE encoder) ", "VAE decoding",
        "RAM: ", "disk: at most 0.003 GB for 2 pictures", "s per picture, ", "RTX 4090. An estimate",
    ):  # fmt: skip
        assert words in text, words
    phases = cost.inference_phases(FULL, counted_setting(run), painting)
    assert list(phases) == ["denoising", "VAE decoding"], "what the memory table decides"


def counted_setting(run: Run) -> cost.Setting:
    from library.forecast.choice import setting_of

    return setting_of(run, FULL)


def test_ram_is_shared_by_processes() -> None:
    from library.models.machine import Machine

    run = configured(memory=MemoryTable(vram_budget_gb=4))
    machine = Machine(24e9, 32e9, "linux")
    alone, _ = forecast.settle(run, FULL, REFERENCE_CARD, machine, forecast.work_of(run, FULL))
    pair, lines = forecast.settle(run, FULL, REFERENCE_CARD, machine, forecast.work_of(run, FULL, processes=2))
    assert (alone.memory.base_precision, pair.memory.base_precision) == ("int8", "nf4")
    assert lines[0].startswith("chosen for vram_budget_gb = 4 (ram_budget_gb not set: 12.0 GB free")


@pytest.mark.parametrize("vram", [10, 12])
def test_a_picture_that_decides_is_said_with_the_choice(vram: int) -> None:
    preview = SamplingTable(validation_prompt=("x",), validation_width=1536, validation_height=1536)
    run = configured(sampling=preview, memory=MemoryTable(vram_budget_gb=vram, ram_budget_gb=40))
    _, lines = forecast.settle(run, FULL, REFERENCE_CARD)
    assert any("preview, decoding needs most: vae_tiling = true" in line for line in lines)
