"""How near a generated picture is to the one it should be."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = (
    11,
    1.5,
)  # of Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1]."""
    error = F.mse_loss(a.double(), b.double()).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of (3, H, W) pixels in [0, 1], the mean over windows inside the picture.

    Pictures smaller than the window use the largest odd window that fits.
    """
    size = min(WINDOW, *(side - (side + 1) % 2 for side in a.shape[-2:]))
    positions = torch.arange(size, dtype=torch.float64) - size // 2
    bell = torch.exp(-(positions**2) / (2 * SIGMA**2))
    kernel = torch.outer(bell, bell) / bell.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x[:, None], kernel[None, None])

    x, y = a.double().cpu(), b.double().cpu()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean().item()


def colour_distance(a: Tensor, b: Tensor) -> float:
    """Mean RGB distance of the pixels of (3, H, W) in [0, 1]: 0 for equal, sqrt(3) for black on white."""
    return (a.double() - b.double()).square().sum(0).sqrt().mean().item()


SCORES = {"psnr": psnr, "ssim": ssim, "colour_distance": colour_distance}
HIGHER_IS_BETTER = ("psnr", "ssim")
