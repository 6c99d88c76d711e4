"""Pixels on their way in and out: a picture file to a canvas of the model's size, and a painted canvas to a PNG."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from library.data.geometry import RESAMPLING
from library.data.images import MASK_THRESHOLD, read_mask, read_rgb
from library.files import atomic_write
from library.sampling.fit import MAX_PIXELS, Fit, Size

BEHIND_TRANSPARENCY = "#ffffff"


def resized(image: Image.Image, size: Size) -> Image.Image:
    """The image at another size, averaged when it shrinks, as the training images are."""
    if image.size == size:
        return image
    shrinks = size[0] * size[1] < image.width * image.height
    return image.resize(size, RESAMPLING["area" if shrinks else "lanczos"])


def on_canvas(image: Image.Image, fit: Fit) -> np.ndarray:
    """The image scaled and placed on its canvas as `fit` says, uint8 (H, W[, 3]); missing pixels repeat its edge."""
    pixels = np.asarray(resized(image, fit.scaled))
    (x, y), (width, height) = fit.offset, fit.canvas
    pixels = pixels[max(0, -y) : max(0, -y) + height, max(0, -x) : max(0, -x) + width]
    top, left = max(0, y), max(0, x)
    sides = [(top, height - top - pixels.shape[0]), (left, width - left - pixels.shape[1])]
    return np.pad(pixels, sides + [(0, 0)] * (pixels.ndim - 2), mode="edge")


def read_picture(path: Path) -> Image.Image:
    """The picture as the model is to see it: upright, sRGB, transparency over white."""
    return read_rgb(path.read_bytes(), MAX_PIXELS, BEHIND_TRANSPARENCY)


def picture_pixels(image: Image.Image, fit: Fit) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(on_canvas(image, fit)).permute(2, 0, 1).float() / 127.5 - 1


def mask_pixels(path: Path | None, fit: Fit) -> Tensor | None:
    """(1, H, W) of zeros and ones, or None without a mask; the threshold comes after the resizing."""
    if path is None:
        return None
    grey = read_mask(path.read_bytes(), MAX_PIXELS)
    return torch.from_numpy(on_canvas(grey, fit) >= MASK_THRESHOLD).float()[None]


def to_bytes(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8 on the CPU, rounded as diffusers does."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu()


def finished(painted: np.ndarray, fit: Fit) -> Image.Image:
    """The result's part of a painted canvas (H, W, 3), at the result's size."""
    left, top, right, bottom = fit.box
    return resized(Image.fromarray(painted[top:bottom, left:right]), fit.result)


def with_unmasked(result: Image.Image, picture: Path, mask: Path, fit: Fit) -> Image.Image:
    """The result with the unmasked pixels of the picture pasted back over it."""
    source, grey = read_picture(picture), read_mask(mask.read_bytes(), MAX_PIXELS)
    whole = fit.scaled[0] <= fit.canvas[0] and fit.scaled[1] <= fit.canvas[1] and fit.box[2:] == fit.scaled
    if not whole:
        source, grey = (finished(on_canvas(image, fit), fit) for image in (source, grey))
    repainted = resized(grey, fit.result).point(lambda level: 255 if level >= MASK_THRESHOLD else 0)
    return Image.composite(result, resized(source, fit.result), repainted)


def save_png(image: Image.Image, path: Path, settings: dict[str, object]) -> None:
    """Write the image with its settings inside: as readable text (`parameters`) and as JSON (`influx`)."""
    info = PngImagePlugin.PngInfo()
    words = ", ".join(f"{name}: {value}" for name, value in settings.items() if name != "prompt")
    info.add_itxt("parameters", f"{settings.get('prompt', '')}\n{words}")
    info.add_itxt("influx", json.dumps(settings, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    atomic_write(path, buffer.getvalue())
