"""Compares a trained network with its base on Fill Circles: one labelled picture, one file of numbers.

    python tools/compare_circles.py --data data/fill_circles --base nano --before DIR --after DIR --output_dir DIR

`before` and `after` are folders of influx_infer.py's results on test_A, by the base alone and with the network. Writes
comparison.png (source | base | trained | target on held-out pairs) and metrics.json: the measures of tools/
circle_metrics.py before and after, and their ceiling: what is left of the targets themselves after the base's VAE.
The headline numbers are of held-out pairs of colours that training saw apart; unseen colour words stand beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from library.config.tables import ModelTable
from library.errors import DataError, UserError
from library.files import atomic_write
from library.models.base import Base
from tools.circle_metrics import ceiling, measure

HEADLINE = "unseen_pair"
SHOWN = {"unseen_pair": 6, "unseen_word": 2}
"""Rows of the picture, by split."""
SIDE = 128
MARGIN = 12
LINE = 22
COLUMNS = ("source", "base model", "trained", "target")

Entry = dict[str, object]


def read_manifest(data: Path) -> list[Entry]:
    """The held-out items of a Fill Circles folder. Raises DataError if there are none."""
    path = data / "test.json"
    if not path.is_file():
        raise DataError(f"there is no {path}: make the data with tools/fill_circles.py first")
    return json.loads(path.read_text(encoding="utf-8"))["items"]


def open_images(folder: Path, entries: list[Entry]) -> list[Image.Image]:
    """One picture for each entry. Raises DataError listing what is missing."""
    paths = [folder / f"{entry['stem']}.png" for entry in entries]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of {len(paths)} pictures, the first {missing[0]}")
    return [Image.open(path).convert("RGB") for path in paths]


def round_trip_of(base_folder: str) -> Callable[[Image.Image], Image.Image]:
    """A picture as the base's VAE gives it back: the best any network on this base can do."""
    import torch

    from library.sampling.pixels import to_bytes

    vae = Base.open(ModelTable(pretrained_model_name_or_path=base_folder)).load_vae()

    def round_trip(image: Image.Image) -> Image.Image:
        size = (image.height, image.width, 3)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size).permute(2, 0, 1)
        mean, _ = vae.encode(pixels[None].float() / 127.5 - 1)
        return Image.fromarray(to_bytes(vae.decode(mean))[0].numpy())

    return round_trip


def measures(data: Path, before: Path, after: Path, base_folder: str) -> dict[str, object]:
    """before, after and ceiling on the headline split, and the same for each other split."""
    entries = read_manifest(data)
    round_trip = round_trip_of(base_folder)
    by_split: dict[str, dict[str, object]] = {}
    for split in dict.fromkeys(str(entry["split"]) for entry in entries):
        chosen = [entry for entry in entries if entry["split"] == split]
        targets = open_images(data / "test_B", chosen)
        by_split[split] = {
            "before": measure(open_images(before, chosen), targets, chosen),
            "after": measure(open_images(after, chosen), targets, chosen),
            "ceiling": ceiling(round_trip, targets, chosen),
        }
    headline = by_split.pop(HEADLINE)
    return {**headline, "split": HEADLINE, "other_splits": by_split}


def draw_grid(data: Path, before: Path, after: Path) -> Image.Image:
    """The labelled picture: a row for each shown item, its caption above it."""
    entries = read_manifest(data)
    rows = []
    for split, count in SHOWN.items():
        rows += [entry for entry in entries if entry["split"] == split][:count]
    folders = (data / "test_A", before, after, data / "test_B")
    columns = [open_images(folder, rows) for folder in folders]
    font = ImageFont.load_default(15)
    width = MARGIN + len(COLUMNS) * (SIDE + MARGIN)
    picture = Image.new("RGB", (width, MARGIN + LINE + len(rows) * (SIDE + LINE + MARGIN)), "white")
    pen = ImageDraw.Draw(picture)
    for number, label in enumerate(COLUMNS):
        pen.text((MARGIN + number * (SIDE + MARGIN) + SIDE / 2, MARGIN), label, "black", font, anchor="ma")
    for row, entry in enumerate(rows):
        top = MARGIN + LINE + row * (SIDE + LINE + MARGIN)
        unseen = " (a colour word training never saw)" if entry["split"] == "unseen_word" else ""
        pen.text((MARGIN, top), f"{entry['prompt']}{unseen}", "dimgray", font)
        for number, images in enumerate(columns):
            shown = images[row].resize((SIDE, SIDE), Image.Resampling.NEAREST)
            picture.paste(shown, (MARGIN + number * (SIDE + MARGIN), top + LINE))
    return picture


def table(found: dict[str, object]) -> str:
    """The headline numbers in words, for the terminal."""
    names = ("psnr", "colour_distance_inside", "colour_distance_outside", "both_colours_right")
    lines = [f"{'':8}" + "".join(f"{name:>26}" for name in names)]
    for column in ("before", "after", "ceiling"):
        values = found[column]
        assert isinstance(values, dict)
        lines.append(f"{column:8}" + "".join(f"{values[name]:26.3f}" for name in names))
    return "\n".join(lines)


def compare(data: Path, before: Path, after: Path, base_folder: str, output_dir: Path) -> dict[str, object]:
    """Write comparison.png and metrics.json; returns the numbers."""
    found = measures(data, before, after, base_folder)
    grid = draw_grid(data, before, after)
    atomic_write(output_dir / "metrics.json", json.dumps(found, indent=2) + "\n")
    atomic_write(output_dir / "comparison.png", lambda path: grid.save(path, "PNG"))
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/fill_circles.py")
    parser.add_argument("--before", type=Path, required=True, help="results of the base alone")
    parser.add_argument("--after", type=Path, required=True, help="results with the network")
    parser.add_argument("--base", default="nano", help="the base model")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    try:
        found = compare(options.data, options.before, options.after, options.base, options.output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
