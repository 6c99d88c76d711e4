"""The three modes on one task: Fill Circles on the nano base, one recipe, one number of steps, 200 held-out pairs.

    python -m benchmarks.modes --steps 1000

`edit` sees the outline where it paints, `spatial` beside it, `mask` (everything masked) not at all: it has the caption
alone and shows what the other two are worth. Runs the plain commands; writes benchmarks/results/
modes.json and docs/images/modes_compared.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.circle_metrics import ceiling, measure
from tools.compare_circles import HEADLINE, LINE, MARGIN, SIDE, open_images, read_manifest, round_trip_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "config_examples/quickstart.toml"
DATA = ROOT / "data" / "fill_circles"
OUTPUT = ROOT / "output" / "modes"
SHOWN = 6
WHITE = OUTPUT / "white.png"
TRAINED = {
    "edit": ["--mode", "edit"],
    "spatial": ["--mode", "spatial", "--mask_only_right"],
    "mask": ["--mode", "mask", "--generate_mask", "full"],
}
APPLIED = {"edit": [], "spatial": [], "mask": ["--mask", str(WHITE), "--keep_unmasked", "false"]}


def run(*words: str) -> float:
    """One command; returns its CPU-seconds on all threads, this machine's load left out."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def train_and_apply(mode: str, steps: int) -> dict[str, float]:
    """Cache, train and infer in one mode; returns what the training cost."""
    folder = OUTPUT / mode
    config = ["--config_file", CONFIG, "--output_dir", str(folder)]
    run("influx_cache.py", *config, *TRAINED[mode])
    cpu = run("influx_train.py", *config, *TRAINED[mode], "--max_train_steps", str(steps))
    run("influx_infer.py", *config, "--mode", mode, *APPLIED[mode])
    return {"cpu_seconds": round(cpu, 1)}


def draw(folders: dict[str, Path]) -> Image.Image:
    """Source, each mode's answer, and the target."""
    rows = [entry for entry in read_manifest(DATA) if entry["split"] == HEADLINE][:SHOWN]
    font = ImageFont.load_default(15)
    picture = Image.new(
        "RGB", (MARGIN + len(folders) * (SIDE + MARGIN), MARGIN + LINE + SHOWN * (SIDE + LINE + MARGIN)), "white"
    )
    pen = ImageDraw.Draw(picture)
    for number, (label, folder) in enumerate(folders.items()):
        left = MARGIN + number * (SIDE + MARGIN)
        pen.text((left + SIDE / 2, MARGIN), label, "black", font, anchor="ma")
        for row, image in enumerate(open_images(folder, rows)):
            top = MARGIN + LINE + row * (SIDE + LINE + MARGIN)
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + LINE))
            if number == 0:
                pen.text((left, top), str(rows[row]["prompt"]), "dimgray", font)
    return picture


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    if OUTPUT.exists():
        print(f"error: {OUTPUT} is there from an earlier run: move it away first", file=sys.stderr)
        return 2
    OUTPUT.mkdir(parents=True)
    Image.new("L", (64, 64), 255).save(WHITE)
    run("tools/fill_circles.py", "--output_dir", str(DATA), "--num_train", "1000", "--num_test", "200")
    entries = [entry for entry in read_manifest(DATA) if entry["split"] == HEADLINE]
    targets = open_images(DATA / "test_B", entries)
    found: dict[str, object] = {"steps": steps, "split": HEADLINE}
    for mode in TRAINED:
        cost = train_and_apply(mode, steps)
        found[mode] = {**measure(open_images(OUTPUT / mode / "edited", entries), targets, entries), **cost}
    found["ceiling"] = ceiling(round_trip_of(str(ROOT / "nano")), targets, entries)
    (ROOT / "benchmarks" / "results" / "modes.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    answers = {mode: OUTPUT / mode / "edited" for mode in TRAINED}
    draw({"source": DATA / "test_A", **answers, "target": DATA / "test_B"}).save(
        ROOT / "docs" / "images" / "modes_compared.png"
    )
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
