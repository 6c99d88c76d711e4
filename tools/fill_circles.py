"""Generates Fill Circles, the example data: an outline and a caption become a filled circle on a background.

    python tools/fill_circles.py --output_dir data/fill_circles --num_train 1000 --num_test 200 --size 64 --seed 0

    train_A        outlines, white on black         test_A, test_B, test_combined   the same for the test
    train_B        filled circles on a background   test_prompts                    one caption per image stem
    train_combined outline and target side by side  test.json                       every test item's true circle,
    prompts, prompts_combined   captions                                            colours and split

The test has three splits: "unseen_pair" (both colours seen in training, never together), "unseen_word" (a colour word
that no training caption holds) and "seen_pair". The same arguments always give the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from tools.nano.shapes import Shape, canvas, draw_shape, finish
from tools.palette import COLOURS, held_out_pairs, training_pairs, unseen_word_pairs

PAIRS = {
    "train": training_pairs,
    "unseen_pair": held_out_pairs,
    "unseen_word": unseen_word_pairs,
    "seen_pair": training_pairs,
}
"""Which colour pairs each split draws from."""

COMBINED_PREFIX = ""
"""Put before each caption in prompts_combined."""


@dataclass(frozen=True)
class Circle:
    """One item: the true circle in pixels, its colours by name, and the split it belongs to."""

    stem: str
    width: int
    height: int
    x: float
    y: float
    radius: float
    inside: str
    outside: str
    split: str

    @property
    def prompt(self) -> str:
        """The caption, in fill50k's wording."""
        return f"{self.inside} circle with {self.outside} background"

    @property
    def pair_seen(self) -> bool:
        """Whether training draws from this colour pair."""
        return (self.inside, self.outside) in training_pairs()


def draw_circle(seed: int, split: str, index: int, width: int, height: int) -> Circle:
    """Item `index` of a split; colour pairs are dealt evenly, in an order shuffled by the seed."""
    pairs = PAIRS[split]()
    random.Random(f"pairs:{seed}:{split}:{index // len(pairs)}").shuffle(pairs)
    inside, outside = pairs[index % len(pairs)]
    rng = random.Random(f"circle:{seed}:{split}:{index}")
    side = min(width, height)
    radius = round(rng.uniform(0.14, 0.38) * side, 2)
    x = round(rng.uniform(radius + 1, width - radius - 1), 2)
    y = round(rng.uniform(radius + 1, height - radius - 1), 2)
    return Circle(f"{index:05d}", width, height, x, y, radius, inside, outside, split)


def draw_outline(circle: Circle) -> Image.Image:
    """The source: a white outline on black."""
    image = canvas(circle.width, circle.height, (0, 0, 0))
    line = max(1.0, min(circle.width, circle.height) / 40)
    draw_shape(image, Shape("circle", circle.x, circle.y, circle.radius, (255, 255, 255), line))
    return finish(image)


def draw_target(circle: Circle) -> Image.Image:
    """The target: the filled circle on its background."""
    image = canvas(circle.width, circle.height, COLOURS[circle.outside])
    draw_shape(image, Shape("circle", circle.x, circle.y, circle.radius, COLOURS[circle.inside]))
    return finish(image)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both images on one canvas."""
    image = Image.new("RGB", (left.width + right.width, left.height))
    image.paste(left, (0, 0))
    image.paste(right, (left.width, 0))
    return image


def training_items(count: int, width: int, height: int, seed: int) -> list[Circle]:
    """The training circles."""
    return [draw_circle(seed, "train", index, width, height) for index in range(count)]


def test_items(counts: dict[str, int], width: int, height: int, seed: int) -> list[Circle]:
    """The test circles, split after split, with running stems."""
    drawn = (draw_circle(seed, split, index, width, height) for split, n in counts.items() for index in range(n))
    return [Circle(**{**asdict(circle), "stem": f"{place:05d}"}) for place, circle in enumerate(drawn)]


def write_items(circles: list[Circle], root: Path, part: str, prompts: str) -> Iterator[Path]:
    """Write one part ("train" or "test"): A, B and combined images, and the captions; yields each file."""
    folders = {name: root / f"{part}_{name}" for name in ("A", "B", "combined")}
    texts = {root / prompts: "", root / f"{prompts}_combined": COMBINED_PREFIX}
    for folder in (*folders.values(), *texts):
        folder.mkdir(parents=True, exist_ok=True)
    for circle in circles:
        source, target = draw_outline(circle), draw_target(circle)
        images = {"A": source, "B": target, "combined": side_by_side(source, target)}
        for name, image in images.items():
            path = folders[name] / f"{circle.stem}.png"
            image.save(path)
            yield path
        for folder, prefix in texts.items():
            path = folder / f"{circle.stem}.txt"
            path.write_text(f"{prefix}{circle.prompt}\n", encoding="utf-8")
            yield path


def manifest_entry(circle: Circle) -> dict[str, object]:
    """A test item as test.json holds it."""
    colours = {"inside_rgb": COLOURS[circle.inside], "outside_rgb": COLOURS[circle.outside]}
    return {**asdict(circle), **colours, "prompt": circle.prompt, "pair_seen": circle.pair_seen}


def generate(
    output_dir: Path,
    num_train: int,
    num_test: int,
    size: tuple[int, int] = (64, 64),
    seed: int = 0,
    num_unseen_words: int = 40,
    num_seen_pairs: int = 40,
) -> list[Path]:
    """Write the whole data set and return its files. `num_test` counts the items of unseen pairs of seen colours."""
    width, height = size
    for value in size:
        if value < 32 or value % 16:
            raise ValueError(f"size must be a multiple of 16 and at least 32, not {value}")
    for name, count in (("num_train", num_train), ("num_test", num_test)):
        if count < 0:
            raise ValueError(f"{name} must not be negative, not {count}")
    counts = {"unseen_pair": num_test, "unseen_word": num_unseen_words, "seen_pair": num_seen_pairs}
    test = test_items(counts if num_test else {}, width, height, seed)
    files = list(write_items(training_items(num_train, width, height, seed), output_dir, "train", "prompts"))
    files += write_items(test, output_dir, "test", "test_prompts")
    manifest = output_dir / "test.json"
    entries = [manifest_entry(circle) for circle in test]
    manifest.write_text(json.dumps({"seed": seed, "items": entries}, indent=1) + "\n", encoding="utf-8")
    return [*files, manifest]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/fill_circles"))
    parser.add_argument("--num_train", type=int, default=1000, help="training pairs")
    parser.add_argument("--num_test", type=int, default=200, help="test items of unseen pairs of seen colours")
    parser.add_argument("--num_unseen_words", type=int, default=40, help="test items with an unseen colour word")
    parser.add_argument("--num_seen_pairs", type=int, default=40, help="test items of colour pairs seen in training")
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="side, or width and height; multiples of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.size) > 2:
        parser.error(f"--size takes one or two numbers, not {len(options.size)}")
    size = (options.size[0], options.size[-1])
    try:
        files = generate(
            options.output_dir,
            options.num_train,
            options.num_test,
            size,
            options.seed,
            options.num_unseen_words,
            options.num_seen_pairs,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(files)} files to {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
