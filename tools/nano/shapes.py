"""Draws one anti-aliased shape, filled or as an outline, on a PIL canvas."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SUPERSAMPLE = 4
"""Everything is drawn this many times larger and averaged down."""


@dataclass(frozen=True)
class Shape:
    """A shape by name, centre and radius, in pixels of the final image."""

    name: str
    x: float
    y: float
    radius: float
    colour: tuple[int, int, int]
    line: float = 0.0
    """Width of the outline; 0 fills the shape."""


def corners(shape: Shape) -> list[tuple[float, float]]:
    """The polygon of a shape that is no circle."""
    unit: list[tuple[float, float]]
    if shape.name == "square":
        unit = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape.name == "triangle":
        unit = [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    elif shape.name == "diamond":
        unit = [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    elif shape.name == "cross":
        a, b = 0.33, 1.0
        quarter = [(-a, -a), (-a, -b), (a, -b)]
        unit = list(quarter)
        for _ in range(3):
            quarter = [(-v, u) for u, v in quarter]
            unit += quarter
    elif shape.name == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, 1.05 if k % 2 == 0 else 0.45) for k in range(10)]
        unit = [(r * math.cos(angle), r * math.sin(angle)) for angle, r in turns]
    else:
        raise ValueError(f"unknown shape {shape.name!r}; known: {', '.join(SHAPES)}")
    return [(shape.x + shape.radius * u, shape.y + shape.radius * v) for u, v in unit]


def canvas(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """A flat supersampled canvas."""
    return Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), colour)


def draw_shape(image: Image.Image, shape: Shape) -> None:
    """Draw on a supersampled canvas, in place."""
    pen = ImageDraw.Draw(image)
    s = SUPERSAMPLE
    width = max(1, round(shape.line * s))
    if shape.name == "circle":
        x, y, radius = s * shape.x, s * shape.y, s * shape.radius
        box = [x - radius, y - radius, x + radius, y + radius]
        if shape.line:
            pen.ellipse(box, outline=shape.colour, width=width)
        else:
            pen.ellipse(box, fill=shape.colour)
        return
    points = [(s * x, s * y) for x, y in corners(shape)]
    if shape.line:
        pen.line([*points, points[0], points[1]], fill=shape.colour, width=width, joint="curve")
    else:
        pen.polygon(points, fill=shape.colour)


def finish(image: Image.Image) -> Image.Image:
    """Average a supersampled canvas down to its final size."""
    return image.reduce(SUPERSAMPLE)
