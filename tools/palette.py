"""The named colours: one list for the example data set, its metric and the nano base's training data."""

from collections.abc import Sequence

RGB = tuple[int, int, int]

SEEN_COLOURS: dict[str, RGB] = {
    "red": (222, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 75, 225),
    "yellow": (250, 225, 45),
    "orange": (250, 135, 20),
    "purple": (125, 40, 165),
    "pink": (255, 155, 195),
    "brown": (125, 70, 30),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "cyan": (45, 215, 235),
    "magenta": (235, 40, 195),
    "navy": (15, 20, 100),
    "olive": (125, 130, 25),
    "beige": (235, 212, 165),
}
"""Colours that the Fill Circles training pairs use."""

UNSEEN_COLOURS: dict[str, RGB] = {
    "teal": (0, 125, 130),
    "lime": (150, 240, 45),
    "maroon": (115, 10, 50),
    "lavender": (180, 160, 240),
}
"""Colour words that only the test set uses: a LoRA never sees them, the nano base knows them."""

COLOURS: dict[str, RGB] = SEEN_COLOURS | UNSEEN_COLOURS

HELD_OUT_STEPS = (3, 7, 11, 14)
"""A pair of seen colours is held out when their places in the list differ by one of these, modulo the length."""


def all_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every ordered pair (circle, background) of two different colours."""
    return [(inside, outside) for inside in names for outside in names if inside != outside]


def is_held_out(inside: str, outside: str) -> bool:
    """Whether training never sees this pair of seen colours (each colour keeps 11 partners in both roles)."""
    names = list(SEEN_COLOURS)
    return (names.index(outside) - names.index(inside)) % len(names) in HELD_OUT_STEPS


def training_pairs() -> list[tuple[str, str]]:
    """The 176 pairs of seen colours that training draws from."""
    return [pair for pair in all_pairs(list(SEEN_COLOURS)) if not is_held_out(*pair)]


def held_out_pairs() -> list[tuple[str, str]]:
    """The 64 pairs of seen colours that only the test set draws from."""
    return [pair for pair in all_pairs(list(SEEN_COLOURS)) if is_held_out(*pair)]


def unseen_word_pairs() -> list[tuple[str, str]]:
    """The pairs with at least one colour word that training never saw."""
    return [pair for pair in all_pairs(list(COLOURS)) if set(pair) & set(UNSEEN_COLOURS)]


def nearest_colour(rgb: Sequence[float]) -> str:
    """The name of the palette colour at the smallest Euclidean RGB distance."""
    return min(COLOURS, key=lambda name: sum((float(a) - b) ** 2 for a, b in zip(rgb, COLOURS[name], strict=True)))
