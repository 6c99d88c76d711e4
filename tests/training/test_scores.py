"""Scores against values worked out by hand and a slow direct computation."""

import math

import numpy
import pytest
import torch

from library.training.scores import colour_distance, psnr, ssim


def pictures(height: int = 19, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and a noisy copy."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, height, width, generator=generator)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def slow_ssim(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Every window on its own."""
    distance = numpy.arange(11) - 5
    weights = numpy.exp(-(distance[:, None] ** 2 + distance[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(3):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                x, y = (p[channel, top : top + 11, left : left + 11] for p in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(numpy.mean(values))


def test_ssim_equals_the_definition():
    """Convolutions and loops agree."""
    a, b = pictures()
    assert ssim(a, b) == pytest.approx(slow_ssim(a.double().numpy(), b.double().numpy()), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a[:, :8, :6], b[:, :8, :6]) < 1.0


def test_psnr_and_colour_distance():
    """An error of 0.1 everywhere is 20 dB, and sqrt(3) / 10 in RGB."""
    flat = torch.full((3, 4, 4), 0.5)
    assert psnr(flat, flat + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(flat, flat) == math.inf
    assert colour_distance(flat, flat + 0.1) == pytest.approx(math.sqrt(3) / 10, abs=1e-6)
