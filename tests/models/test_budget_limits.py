"""The plan's limits: what a machine has free, what Windows locks, pictures between steps, and painting alone."""

import re
from dataclasses import replace

import pytest

from library.config.tables import MemoryTable
from library.errors import ConfigError
from library.models import budget, cost
from library.models.cost import GB, REFERENCE_CARD, Picture, Setting, Work
from library.models.machine import MARGIN, Machine, this_machine
from library.models.shape import FluxShape

FULL = FluxShape()


def work(pixels: int = 512, **other) -> Work:
    given = {"trained": 40_000_000, "rank": 16, "optimizer": "AdamW8bit", "batch": 1, "text": 512}
    return Work(**{**given, "width": pixels, "height": pixels, **other})


def machine(total: float, free: float | None = None, platform: str = "linux") -> Machine:
    return Machine((total if free is None else free) * GB, total * GB, platform)


def test_free_ram_is_the_budget_where_none_is_set() -> None:
    table = MemoryTable(vram_budget_gb=4)
    roomy = budget.choose(FULL, table, work(), machine=machine(32))
    narrow = budget.choose(FULL, table, work(), machine=machine(32, free=11))
    assert (roomy.setting.precision, narrow.setting.precision) == ("int8", "nf4")
    assert narrow.ram <= 11 * GB - MARGIN
    assert budget.budget_words(table, machine(32, free=11)) == (
        "vram_budget_gb = 4 (ram_budget_gb not set: 11.0 GB free, 1 GB of it left alone)"
    )
    given = MemoryTable(vram_budget_gb=4, ram_budget_gb=20)
    assert budget.choose(FULL, given, work(), machine=machine(32, free=11)) == roomy
    with pytest.raises(ConfigError, match=r"ram_budget_gb not set: 5\.0 GB free.*nothing fits"):
        budget.choose(FULL, table, work(), machine=machine(32, free=5))


def test_this_machine_has_some() -> None:
    here = this_machine()
    assert 0 < here.free <= here.total and here.total > 1e9
    assert this_machine("win32").lockable == here.total / 2 and this_machine("linux").lockable == float("inf")


def test_windows_locks_half_of_the_ram() -> None:
    """int8 would lock 8.6 GB of streamed blocks. On a slow card copies from pageable RAM stay hidden, on a fast not."""
    table = MemoryTable(vram_budget_gb=2.7)
    windows, linux = machine(16, 16.8, "win32"), machine(16, 16.8)
    free = budget.choose(FULL, table, work(), machine=linux)
    assert free.setting.pin and free.locked > 8 * GB
    held = budget.choose(FULL, table, work(), machine=windows)
    assert (held.setting.precision, held.setting.pin) == ("int8", False) and held.locked <= 8 * GB
    assert "pin_memory = false" in held.toml(57) and "pin_memory = false" not in free.toml(57)
    assert budget.setting_of(MemoryTable(**held.values(57)), FULL, "bf16") == held.setting
    fast = next(card for card in cost.CARDS if card.name == "RTX 4090")
    assert budget.choose(FULL, table, work(), fast, machine=windows).setting.precision == "nf4"
    asked = MemoryTable(vram_budget_gb=2.7, pin_memory=True)
    assert budget.choose(FULL, asked, work(), machine=windows).setting.precision == "nf4"


def test_pageable_ram_goes_through_two_locked_buffers() -> None:
    locked, pageable = (cost.training_ram(FULL, Setting("int8", 57, pin=pin), work()) for pin in (True, False))
    assert locked.locked == locked.parts["streamed blocks (page-locked)"]
    assert pageable.locked == pageable.parts["staging buffers (page-locked)"] < 0.1 * locked.locked
    seconds = [cost.step_seconds(FULL, Setting("int8", 57, pin=pin), work(), cost.CARDS[-1]) for pin in (True, False)]
    assert seconds[1] > 3 * seconds[0]


def test_pictures_have_to_fit_as_well() -> None:
    """Between steps gradients and activations are gone, and the VAE's decoder comes: in fp32, and at 1024 px, more."""
    plain = work(1024)
    shown = replace(plain, preview=Picture(1024, 1024))
    phases = cost.training_phases(FULL, Setting("int8", 40), shown)
    assert list(phases) == ["training step", "optimizer step", "preview, denoising", "preview, decoding"]
    assert cost.largest(phases)[0] == "preview, decoding"
    assert phases["preview, decoding"].parts["VAE activations"] == 6 * 128 * 4 * 1024**2
    table = MemoryTable(vram_budget_gb=8)
    for picture in (Picture(1024, 1024), Picture(1024, 1024, tiling=True), Picture(1024, 1024, vae_bytes=2)):
        choice = budget.choose(FULL, table, replace(plain, preview=picture))
        assert choice.vram <= 8 * GB
    tiled = budget.choose(FULL, table, replace(plain, preview=Picture(1024, 1024, tiling=True))).setting
    assert tiled == budget.choose(FULL, table, plain).setting, "a tiled preview needs less than the step"


def test_a_picture_that_breaks_the_budget_is_named() -> None:
    shown = work(512, preview=Picture(1536, 1536))
    with pytest.raises(
        ConfigError, match=r"the phase preview, decoding: vae_tiling = true or pictures of at most"
    ) as e:
        budget.choose(FULL, MemoryTable(vram_budget_gb=3.5), shown)
    side = int(re.search(r"pictures of at most (\d+) x", str(e.value))[1])
    assert side in (768, 512) and "validation_width" in str(e.value)
    budget.choose(FULL, MemoryTable(vram_budget_gb=3.5), replace(shown, preview=Picture(side, side)))
    budget.choose(FULL, MemoryTable(vram_budget_gb=3.5), replace(shown, preview=Picture(1536, 1536, tiling=True)))


def test_held_out_items_are_a_phase_of_their_own() -> None:
    measured = work(512, held_out=Picture(512, 512, batch=4, decoded=False))
    assert "validation, denoising" in cost.training_phases(FULL, Setting(), measured)
    assert "validation, decoding" not in cost.training_phases(FULL, Setting(), measured)
    assert "validation, decoding" in cost.training_phases(FULL, Setting(), work(held_out=Picture(512, 512)))


@pytest.mark.parametrize(
    ("changes", "phase", "part", "per_parameter"),
    [
        ({"micro_steps": 2}, "training step", "gradients", 4),
        ({"micro_steps": 2, "weight_bytes": 2}, "training step", "gradients", 2),
        ({}, "optimizer step", "gradients", 4),
        ({"optimizer": "AdamW"}, "optimizer step", "optimizer", 8),
        ({"optimizer": "Prodigy"}, "training step", "optimizer", 16),
        ({"optimizer": "AdamW", "optimizer_offload": True}, "training step", "optimizer", 0),
        ({"optimizer": "AdamW", "optimizer_offload": True}, "optimizer step", "optimizer", 8),
        ({"optimizer": "AdamW"}, "optimizer step", "what lives while it steps", 4),
        ({"processes": 2}, "optimizer step", "what lives while it steps", 4),
        ({"use_ema": True, "ema_on_device": True}, "training step", "moving average", 4),
        ({"use_ema": True}, "training step", "moving average", 0),
        ({"use_ema": True, "preview": Picture(512, 512)}, "preview, decoding", "weights set aside", 4),
    ],
)
def test_what_lives_when(changes, phase, part, per_parameter) -> None:
    found = cost.training_phases(FULL, Setting("int8"), work(**changes))[phase].parts[part]
    assert found == pytest.approx(per_parameter * 40_000_000)


def test_first_gradients_take_the_place_of_checkpoints() -> None:
    """At 512 px and rank 16 the checkpoints that leave (0.54 GB) are more than the gradients that come (0.16 GB)."""
    step = cost.training_phases(FULL, Setting("int8"), work())["training step"]
    assert step.parts["gradients"] == 0
    # Offloaded checkpoints leave nothing behind: the end of the backward pass is the worst, with fewer activations.
    away = Setting("int8", offload=True)
    offloaded = cost.training_phases(FULL, away, work())["training step"].parts
    assert offloaded["gradients"] == 4 * 40_000_000
    dequantised = cost.dequantised(away, cost.weights(FULL, away))
    assert offloaded["activations"] < cost.activations(FULL, away, work()) + dequantised


def test_a_moving_average_in_ram_and_clip_on_the_device() -> None:
    assert cost.training_ram(FULL, Setting(), work(use_ema=True)).parts["moving average"] == 160e6
    both = cost.training_phases(FULL, Setting(), work(clip=123_060_480))["training step"]
    assert both.parts["CLIP"] == 2 * 123_060_480
    assert both.parts["CLIP's activations"] > 0


def test_painting_is_settled_for_its_own_size() -> None:
    """Neither gradients nor optimizer: more of the base stays on the card than in training."""
    picture = Picture(1024, 1024, tiling=True, steps=30)
    painting = replace(work(1024), trained=0, optimizer="", preview=picture, trains=False, network_bytes=0.2 * GB)
    table = MemoryTable(vram_budget_gb=12)
    choice = budget.choose(FULL, table, painting)
    assert set(choice.values(57)) == {"base_precision", "blocks_to_swap", "modulation_on_cpu"}
    assert choice.vram <= 12 * GB and choice.phase in ("denoising", "VAE decoding")
    assert choice.setting.blocks_to_swap < budget.choose(FULL, table, work(1024)).setting.blocks_to_swap
    wider = replace(painting, preview=Picture(2048, 1024, tiling=True, steps=30), width=2048)
    assert budget.choose(FULL, table, wider).setting.blocks_to_swap > choice.setting.blocks_to_swap
    whole = replace(painting, preview=Picture(1024, 1024, steps=30))
    with pytest.raises(ConfigError, match=r"VAE decoding.*vae_tiling = true.*inference_resolution"):
        budget.choose(FULL, MemoryTable(vram_budget_gb=3), whole)
    once = cost.painting_seconds(FULL, choice.setting, replace(picture, steps=1), 512, REFERENCE_CARD)
    assert 15 * once < choice.seconds < 30 * once
