"""The first user's check of real weights: it passes a trained base, and tells an untrained one."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.config.tables.model import ModelTable
from library.models.base import Base
from tests.tiny import tiny_base
from tools.fill_circles import draw_circle, draw_target
from tools.verify_base import gaussian_loss, verify

NANO = Path(__file__).resolve().parents[2] / "nano"


CIRCLE = draw_circle(0, "train", 3, 64, 64)


def run(folder: Path, output: Path) -> bool:
    """Verify with a picture of the kind that the nano base was trained on."""
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    draw_target(CIRCLE).save(output / "picture.png")
    return verify(base, output / "picture.png", output, 64, CIRCLE.prompt, compare=True)


def test_the_nano_base_passes(tmp_path, capsys) -> None:
    passed = run(NANO, tmp_path)
    said = capsys.readouterr().out
    assert passed, said
    assert "(equal)" in said and said.count("(ok)") == 4 and "everything passed" in said
    assert Image.open(tmp_path / "inpainted.png").size == (64, 64)


def test_random_weights_are_equal_to_diffusers_but_no_trained_model(tmp_path, capsys) -> None:
    assert not run(tiny_base(tmp_path / "base"), tmp_path)
    said = capsys.readouterr().out
    assert "(equal)" in said and "(OUTSIDE)" in said


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
def test_the_bound_is_that_of_the_best_linear_guess(level) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1.7 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    n = torch.randn(200_000, generator=generator, dtype=torch.float64)
    z, v = (1 - level) * x + level * n, n - x
    guess = z * (z @ v) / (z @ z)
    assert gaussian_loss(1.7**2, level) == pytest.approx(float((v - guess).square().mean()), rel=0.02)
