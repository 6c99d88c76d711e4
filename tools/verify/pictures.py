"""The picture that is verified with, its hole, and the labelled grid that shows the result."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.errors import DataError
from library.sampling.fit import fit_own_size, fit_size
from library.sampling.pixels import picture_pixels, read_picture, save_png, to_bytes
from tools.fill_circles import draw_circle, draw_target

EDGE = 16
"""The hole's edges lie on whole tokens, so that every latent is either hidden or visible."""
GREY = (127, 127, 127)


def picture(path: Path | None, side: int) -> tuple[Image.Image, str]:
    """The middle of the picture at side x side, and the prompt for it if the user gives none.

    Without a path: a drawn circle on a background, which even the nano base knows.
    """
    if path is None:
        circle = draw_circle(0, "train", 3, side, side)
        return draw_target(circle), circle.prompt
    try:
        image = read_picture(path)
    except (DataError, OSError) as error:
        raise DataError(f"{path}: {error}") from error
    pixels = to_bytes(picture_pixels(image, fit_size(image.size, side, side, "crop", str(path))))
    return Image.fromarray(pixels.numpy()), "a photograph"


def pixels_of(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return picture_pixels(image, fit_own_size(image.size))[None]


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal to noise, in dB, of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (one - other).square().mean().clamp_min(1e-12)))


def hole(side: int) -> Tensor:
    """(1, 1, side, side): 1 in the middle quarter of the picture."""
    near = max(1, side // 4 // EDGE) * EDGE
    mask = torch.zeros(1, 1, side, side)
    mask[..., near : side - near, near : side - near] = 1
    return mask


def write_grid(image: Image.Image, mask: Tensor, result: Tensor, caption: str, path: Path, settings: dict) -> None:
    """Write input, masked and result side by side under their names; `result` is (1, 3, side, side) in [-1, 1]."""
    side = image.width
    stencil = Image.fromarray((mask[0, 0] * 255).to(torch.uint8).numpy())
    masked = Image.composite(Image.new("RGB", image.size, GREY), image, stencil)
    panels = {"input": image, "masked": masked, "result": Image.fromarray(to_bytes(result)[0].numpy())}
    gap = max(4, side // 32)
    font = ImageFont.load_default(max(10, side // 20))
    line = max(14, side // 13)
    grid = Image.new("RGB", (3 * side + 4 * gap, side + 3 * gap + 2 * line), "white")
    draw = ImageDraw.Draw(grid)
    for index, (name, panel) in enumerate(panels.items()):
        left = gap + index * (side + gap)
        draw.text((left, gap // 2), name, fill="black", font=font)
        grid.paste(panel, (left, gap + line))
    draw.text((gap, side + 2 * gap + line), caption, fill="black", font=font)
    save_png(grid, path, settings)
