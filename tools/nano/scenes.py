"""The nano base's training pictures: shapes, outlines, gradients, stripes and strokes, each with a caption.

What a LoRA is later taught (an outline and an instruction become a filled circle on a background) is not in here:
a picture is always its own target, and no picture shows an outline beside its filled shape.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tools.nano.shapes import SHAPES, SUPERSAMPLE, Shape, canvas, draw_shape, finish
from tools.palette import COLOURS, RGB

JITTER = 4.0
"""Standard deviation of a scene's colours around the named ones, of 255."""


@dataclass(frozen=True)
class Scene:
    """One picture with its caption; `kind` names the painter, `parts` says what was drawn ("filled", "outline")."""

    image: Image.Image
    caption: str
    kind: str
    parts: tuple[str, ...] = ()


@dataclass
class Brush:
    """The randomness and the size of one scene."""

    rng: random.Random
    width: int
    height: int
    any_colour: bool = False
    """Draw with arbitrary colours instead of near the named ones (for the VAE, whose captions are not used)."""

    @property
    def side(self) -> int:
        """The shorter side, which radii are measured by."""
        return min(self.width, self.height)

    def names(self, count: int) -> list[str]:
        """Different colour names."""
        return self.rng.sample(list(COLOURS), count)

    def tint(self, name: str) -> RGB:
        """A colour near the named one."""
        if self.any_colour:
            return (self.rng.randrange(256), self.rng.randrange(256), self.rng.randrange(256))
        r, g, b = (min(255, max(0, round(self.rng.gauss(c, JITTER)))) for c in COLOURS[name])
        return (r, g, b)

    def shape(self, name: str, colour: str, line: bool = False, span: tuple[float, float] = (0.0, 1.0)) -> Shape:
        """A shape of random size and place, wholly inside the picture's horizontal `span` (as fractions)."""
        left, right = span[0] * self.width, span[1] * self.width
        room = min(right - left, self.height)
        radius = self.rng.uniform(0.14, 0.40) * room
        x = self.rng.uniform(left + radius + 1, max(left + radius + 1, right - radius - 1))
        y = self.rng.uniform(radius + 1, max(radius + 1, self.height - radius - 1))
        width = self.rng.uniform(1.2, 3.0) * self.side / 64 if line else 0.0
        return Shape(name, x, y, radius, self.tint(colour), width)


def place_words(shape: Shape, width: int, height: int) -> str:
    """Where a shape sits, in words; empty in the middle."""
    u, v = shape.x / width, shape.y / height
    tests = (("top", v < 0.4), ("bottom", v > 0.6), ("left", u < 0.4), ("right", u > 0.6))
    words = [word for word, true in tests if true]
    return " ".join(words)


def single(brush: Brush) -> Scene:
    """One filled shape on a flat background."""
    inside, outside = brush.names(2)
    name = brush.rng.choice(SHAPES)
    shape = brush.shape(name, inside)
    image = canvas(brush.width, brush.height, brush.tint(outside))
    draw_shape(image, shape)
    size = "small " if shape.radius < 0.22 * brush.side else "large " if shape.radius > 0.32 * brush.side else ""
    size = size if brush.rng.random() < 0.5 else ""
    where = place_words(shape, brush.width, brush.height)
    at = f" at the {where}" if where and brush.rng.random() < 0.5 else ""
    caption = brush.rng.choice(
        (
            f"a {size}{inside} {name}{at} on a {outside} background",
            f"{size}{inside} {name} with {outside} background{at}",
            f"a {size}{inside} {name} on {outside}{at}",
            f"{outside} background with a {size}{inside} {name}{at}",
        )
    )
    return Scene(finish(image), caption, "single", ("filled",))


def double(brush: Brush) -> Scene:
    """Two filled shapes, left and right."""
    first, second, outside = brush.names(3)
    names = [brush.rng.choice(SHAPES) for _ in range(2)]
    shapes = [brush.shape(names[0], first, span=(0, 0.5)), brush.shape(names[1], second, span=(0.5, 1))]
    image = canvas(brush.width, brush.height, brush.tint(outside))
    for shape in shapes:
        draw_shape(image, shape)
    caption = brush.rng.choice(
        (
            f"a {first} {names[0]} left of a {second} {names[1]} on a {outside} background",
            f"a {second} {names[1]} right of a {first} {names[0]} on {outside}",
            f"{first} {names[0]} and {second} {names[1]} with {outside} background",
        )
    )
    return Scene(finish(image), caption, "double", ("filled", "filled"))


def outline(brush: Brush) -> Scene:
    """The outline of one shape on a flat background, often white on black."""
    inside, outside = ("white", "black") if brush.rng.random() < 0.3 else brush.names(2)
    name = brush.rng.choice((*SHAPES, "circle", "circle"))
    image = canvas(brush.width, brush.height, brush.tint(outside))
    draw_shape(image, brush.shape(name, inside, line=True))
    templates = (
        f"the outline of a {inside} {name} on a {outside} background",
        f"{inside} {name} outline with {outside} background",
    )
    caption = brush.rng.choice(templates)
    return Scene(finish(image), caption, "outline", ("outline",))


def gradient(brush: Brush) -> Scene:
    """A linear gradient between two colours."""
    first, second = brush.names(2)
    across = brush.rng.random() < 0.5
    ramp = Image.linear_gradient("L")
    ramp = ramp.transpose(Image.Transpose.ROTATE_90) if across else ramp
    size = (brush.width, brush.height)
    flat = [Image.new("RGB", size, brush.tint(name)) for name in (second, first)]
    image = Image.composite(flat[0], flat[1], ramp.resize(size))
    ends = ("left", "right") if across else ("top", "bottom")
    caption = f"a gradient from {first} at the {ends[0]} to {second} at the {ends[1]}"
    return Scene(image, caption, "gradient")


def stripes(brush: Brush) -> Scene:
    """Even stripes of two colours."""
    first, second = brush.names(2)
    direction = brush.rng.choice(("vertical", "horizontal", "diagonal"))
    image = canvas(brush.width, brush.height, brush.tint(first))
    pen = ImageDraw.Draw(image)
    period = brush.rng.uniform(0.16, 0.5) * brush.side * SUPERSAMPLE
    colour, (w, h) = brush.tint(second), image.size
    position = brush.rng.uniform(-1, 0) * period - (h if direction == "diagonal" else 0)
    while position < max(w, h):
        end = position + period / 2
        if direction == "vertical":
            pen.rectangle([position, 0, end, h], fill=colour)
        elif direction == "horizontal":
            pen.rectangle([0, position, w, end], fill=colour)
        else:
            pen.polygon([(position, 0), (end, 0), (end + h, h), (position + h, h)], fill=colour)
        position += period
    return Scene(finish(image), f"{direction} {first} and {second} stripes", "stripes")


def stroke(brush: Brush) -> Scene:
    """A bent brush stroke on a flat background."""
    inside, outside = brush.names(2)
    image = canvas(brush.width, brush.height, brush.tint(outside))
    pen = ImageDraw.Draw(image)
    width = brush.rng.uniform(0.06, 0.16) * brush.side * SUPERSAMPLE
    points = [(brush.rng.uniform(0.1, 0.9) * image.width, brush.rng.uniform(0.1, 0.9) * image.height) for _ in range(3)]
    colour = brush.tint(inside)
    curve = []
    for k in range(25):
        t = k / 24
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        curve.append(tuple(a * p + b * q + c * r for p, q, r in zip(*points, strict=True)))
    for x, y in curve:
        pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=colour)
    pen.line(curve, fill=colour, width=round(width))
    return Scene(finish(image), f"a {inside} brush stroke on a {outside} background", "stroke")


def plain(brush: Brush) -> Scene:
    """One colour."""
    (name,) = brush.names(1)
    image = Image.new("RGB", (brush.width, brush.height), brush.tint(name))
    return Scene(image, brush.rng.choice((f"{name} background", f"a plain {name} picture")), "plain")


def twins(brush: Brush) -> Scene:
    """Two panels side by side with the same shape at the same place, in other colours; both filled or both outlines."""
    colours = [brush.names(2), brush.names(2)]
    name = brush.rng.choice(SHAPES)
    line = brush.rng.random() < 0.25
    half = Brush(brush.rng, brush.width // 2, brush.height, brush.any_colour)
    shape = half.shape(name, colours[0][0], line=line)
    image = Image.new("RGB", (brush.width, brush.height))
    for panel, (inside, outside) in enumerate(colours):
        part = canvas(half.width, half.height, half.tint(outside))
        draw_shape(part, Shape(name, shape.x, shape.y, shape.radius, half.tint(inside), shape.line))
        image.paste(finish(part), (panel * half.width, 0))
    what = f"{name} outline" if line else name
    texts = [f"{inside} {what} with {outside} background" for inside, outside in colours]
    caption = f"{texts[0]} beside {texts[1]}" if brush.rng.random() < 0.5 else f"left and right {texts[1]}"
    return Scene(image, caption, "twins", ("outline", "outline") if line else ("filled", "filled"))


PAINTERS: dict[str, tuple[Callable[[Brush], Scene], float]] = {
    "single": (single, 0.46),
    "double": (double, 0.14),
    "outline": (outline, 0.12),
    "gradient": (gradient, 0.07),
    "stripes": (stripes, 0.09),
    "stroke": (stroke, 0.08),
    "plain": (plain, 0.04),
}
"""Each kind of scene with its share; twins are drawn on canvases twice as wide as high only."""

TWINS_SHARE = 0.6


def make_scene(seed: int, index: int, width: int = 64, height: int = 64, any_colour: bool = False) -> Scene:
    """Scene number `index` of the stream `seed`; the same arguments give the same scene."""
    rng = random.Random(f"{seed}:{index}:{width}x{height}")
    brush = Brush(rng, width, height, any_colour)
    if width == 2 * height and rng.random() < TWINS_SHARE:
        return twins(brush)
    painters, shares = zip(*PAINTERS.values(), strict=True)
    return rng.choices(painters, shares)[0](brush)
