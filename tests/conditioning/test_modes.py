"""Each mode fills the four parts of an item as its documentation says; contract tests run over the registry."""

import sys
from pathlib import Path
from subprocess import run

import pytest
import torch

from library.conditioning import MODES, Images, ModeSettings
from library.conditioning.item import Condition

HEIGHT, WIDTH = 32, 48


def pictures(masks: int = 0) -> Images:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.rand(2, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1
    holes = torch.rand(masks, 1, HEIGHT, WIDTH, generator=generator).round() if masks else ()
    return Images(source, target, tuple(holes))


@pytest.mark.parametrize("name", MODES)
def test_items_and_requests_are_whole(name: str) -> None:
    mode, settings = MODES[name], ModeSettings()
    images = pictures(masks=2 if "mask" in mode.needs else 0)
    width, height = mode.canvas(WIDTH, HEIGHT)
    made = mode.items(images, settings) + [
        mode.request(images.source, images.masks[0] if images.masks else None, settings)
    ]
    for item in made:
        assert item.condition.shape == (3, height, width)
        assert item.mask.shape == (1, height, width)
        assert set(item.mask.unique().tolist()) <= {0.0, 1.0}
        assert item.target is None or item.target.shape == (3, height, width)
        repainted = item.mask.bool().expand(3, -1, -1)
        kept = item.condition_pixels()
        assert torch.equal(kept[~repainted], item.condition[~repainted])
        assert not item.blanked or kept[repainted].abs().max() == 0
    assert mode.result(torch.zeros(3, height, width)).shape == (3, HEIGHT, WIDTH)


def test_edit_shows_the_whole_source_under_a_white_mask() -> None:
    images = pictures()
    (item,) = MODES["edit"].items(images, ModeSettings())
    assert item.mask.min() == 1 and torch.equal(item.condition_pixels(), images.source)
    assert torch.equal(item.target, images.target)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_edit_mask_value_fills_the_mask_in_training_and_inference(value: float) -> None:
    settings = ModeSettings(edit_mask_value=value)
    (item,) = MODES["edit"].items(pictures(), settings)
    request = MODES["edit"].request(pictures().source, None, settings)
    assert torch.equal(item.mask, request.mask) and item.mask.unique().tolist() == [value]


def test_edit_with_regions_keeps_one_unblanked_condition() -> None:
    images = pictures(masks=3)
    items = MODES["edit"].items(images, ModeSettings())
    assert [torch.equal(item.mask, mask) for item, mask in zip(items, images.masks, strict=True)] == [True] * 3
    assert all(torch.equal(item.condition_pixels(), images.source) for item in items)


def test_mask_mode_takes_its_target_from_the_image_or_from_elsewhere() -> None:
    images = pictures(masks=1)
    (elsewhere,) = MODES["mask"].items(images, ModeSettings())
    (itself,) = MODES["mask"].items(Images(images.source, None, images.masks), ModeSettings())
    assert torch.equal(elsewhere.target, images.target) and torch.equal(itself.target, images.source)


def test_mask_mode_refuses_to_guess_a_mask() -> None:
    with pytest.raises(ValueError, match="needs a mask"):
        MODES["mask"].request(pictures().source, None, ModeSettings())


def test_spatial_halves_are_exact_and_disjoint() -> None:
    images = pictures()
    right, left = MODES["spatial"].items(images, ModeSettings())
    assert torch.equal(right.mask + left.mask, torch.ones(1, HEIGHT, 2 * WIDTH))
    assert right.mask[..., :WIDTH].max() == 0 and right.mask.sum() == left.mask.sum() == HEIGHT * WIDTH
    assert torch.equal(right.condition_pixels()[..., :WIDTH], images.source)
    assert torch.equal(left.condition_pixels()[..., WIDTH:], images.target)
    assert torch.equal(MODES["spatial"].result(right.target), images.target)


def test_spatial_right_only_is_what_inference_asks_for() -> None:
    (item,) = MODES["spatial"].items(pictures(), ModeSettings(mask_only_right=True))
    request = MODES["spatial"].request(pictures().source, None, ModeSettings())
    assert torch.equal(item.mask, request.mask)
    assert torch.equal(item.condition_pixels(), request.condition_pixels())


def test_condition_channels_are_64_latent_and_256_mask() -> None:
    mask = torch.ones(1, 1, HEIGHT, WIDTH)
    channels = Condition(torch.zeros(1, 16, HEIGHT // 8, WIDTH // 8), mask).channels()
    assert channels.shape == (1, HEIGHT * WIDTH // 256, 320)
    assert channels[..., :64].max() == 0 and channels[..., 64:].min() == 1


def test_the_registry_is_imported_without_torch() -> None:
    code = "import sys, library.conditioning; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
