"""Measures the exported base and draws the model card's samples.

    python -m tools.nano.measure --base nano

Writes nano/measurements.json and nano/samples/*.png. Everything goes through FluxFillPipeline with the numbers of
influx.json, on scenes that training never drew.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxFillPipeline
from PIL import Image

from tools import circle_metrics, fill_circles
from tools.nano.masks import make_mask
from tools.nano.scenes import make_scene
from tools.nano.shapes import SHAPES, Shape, canvas, draw_shape, finish
from tools.nano.vae import to_pixels
from tools.palette import COLOURS, all_pairs, nearest_colour

HELD_OUT = -7
"""Seed of the scenes used here; training and validation use others."""


class Base:
    """The pipeline with the settings that its influx.json asks for."""

    def __init__(self, folder: Path) -> None:
        self.settings = json.loads((folder / "influx.json").read_text(encoding="utf-8"))
        self.pipeline = FluxFillPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def fill(self, images: list[Image.Image], masks: list[Image.Image], prompts: list[str]) -> list[Image.Image]:
        """Repaint the white part of each mask; all images of one size."""
        return self.pipeline(
            prompt=prompts,
            image=images,
            mask_image=masks,
            width=images[0].width,
            height=images[0].height,
            num_inference_steps=self.settings["sample_steps"],
            guidance_scale=self.settings["sample_guidance_scale"],
            max_sequence_length=self.settings["t5xxl_max_token_length"],
            generator=torch.Generator().manual_seed(0),
        ).images

    def draw(self, prompts: list[str], width: int = 64, height: int = 64) -> list[Image.Image]:
        """Paint from the prompt alone: everything is masked."""
        blank, full = Image.new("RGB", (width, height), (127, 127, 127)), Image.new("L", (width, height), 255)
        return self.fill([blank] * len(prompts), [full] * len(prompts), prompts)

    @torch.no_grad()
    def round_trip(self, image: Image.Image) -> Image.Image:
        """Through the VAE and back."""
        pixels = torch.from_numpy(to_pixels(image)).permute(2, 0, 1)[None]
        decoded = self.pipeline.vae.decode(self.pipeline.vae.encode(pixels).latent_dist.mean).sample
        return self.pipeline.image_processor.postprocess(decoded)[0]


def measure_vae(base: Base, count: int = 200) -> dict[str, object]:
    """PSNR of the round trip: scenes, and the Fill Circles targets with all their measures (the ceiling)."""
    scenes = [make_scene(HELD_OUT, index).image for index in range(count)]
    values = [circle_metrics.psnr(np.asarray(base.round_trip(image)), np.asarray(image)) for image in scenes]
    circles = fill_circles.test_items({"unseen_pair": count}, 64, 64, seed=0)
    entries = [fill_circles.manifest_entry(circle) for circle in circles]
    targets = [fill_circles.draw_target(circle) for circle in circles]
    ceiling = circle_metrics.ceiling(base.round_trip, targets, entries)
    return {"scenes_psnr": float(np.mean(values)), "fill_circles": ceiling}


def measure_holes(base: Base, count: int = 120) -> dict[str, float]:
    """Squared error ([-1, 1]) inside the mask of partly masked scenes, and of the kept part in 255ths."""
    scenes = [make_scene(HELD_OUT, index) for index in range(count)]
    masks = [make_mask(HELD_OUT, index, 64, 64) for index in range(count)]
    parts = [(s, m) for s, m in zip(scenes, masks, strict=True) if np.asarray(m).min() == 0 and np.asarray(m).max()]
    images, masks = [s.image for s, _ in parts], [m for _, m in parts]
    captions = [s.caption for s, _ in parts]
    holes = [np.asarray(mask) > 127 for mask in masks]

    def error(answers: list[Image.Image]) -> float:
        pairs = zip(answers, images, holes, strict=True)
        return float(np.mean([np.mean((to_pixels(a) - to_pixels(b))[hole] ** 2) for a, b, hole in pairs]))

    answers = base.fill(images, masks, captions)
    kept = [
        np.abs(to_pixels(a) - to_pixels(b))[~hole].mean() * 127.5
        for a, b, hole in zip(answers, images, holes, strict=True)
    ]
    return {
        "base": error(answers),
        "caption_of_another_scene": error(base.fill(images, masks, captions[1:] + captions[:1])),
        "grey_hole": float(np.mean([np.mean(to_pixels(b)[hole] ** 2) for b, hole in zip(images, holes, strict=True)])),
        "vae_round_trip": error([base.round_trip(image) for image in images]),
        "kept_part_mean_difference_of_255": float(np.mean(kept)),
        "count": len(images),
    }


def silhouette(image: Image.Image, colour: str, background: str) -> np.ndarray | None:
    """Where the picture is nearer to the shape's colour, cropped to its box and scaled to 32 x 32; None if empty."""
    pixels = np.asarray(image, dtype=np.float64)
    near = [np.linalg.norm(pixels - np.array(COLOURS[name]), axis=-1) for name in (colour, background)]
    inside = near[0] < near[1]
    if inside.sum() < 20:
        return None
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(box.astype(np.uint8) * 255).resize((32, 32), Image.Resampling.BILINEAR)) > 127


def templates() -> dict[str, np.ndarray]:
    """Each shape's silhouette as it is drawn for training."""
    found = {}
    for name in SHAPES:
        image = canvas(64, 64, COLOURS["black"])
        draw_shape(image, Shape(name, 32, 32, 24, COLOURS["white"]))
        found[name] = silhouette(finish(image), "white", "black")
    return found


def border_colour(image: Image.Image) -> str:
    """The palette name of the median colour along the picture's edge."""
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    return nearest_colour(np.median(edge, axis=0))


def measure_captions(base: Base, count: int = 240) -> dict[str, float]:
    """Pictures from captions alone: are both colours right, are they swapped, is the shape the nearest template?"""
    pairs = all_pairs(list(COLOURS))
    chosen = [(*pairs[(index * 37) % len(pairs)], SHAPES[index % len(SHAPES)]) for index in range(count)]
    prompts = [f"a large {colour} {shape} on a {background} background" for colour, background, shape in chosen]
    images = [image for start in range(0, count, 60) for image in base.draw(prompts[start : start + 60])]
    known = templates()
    scores = {"background_right": 0, "background_has_the_shapes_colour": 0, "shape_colour_right": 0, "shape_right": 0}
    for image, (colour, background, shape) in zip(images, chosen, strict=True):
        edge = border_colour(image)
        scores["background_right"] += edge == background
        scores["background_has_the_shapes_colour"] += edge == colour
        box = silhouette(image, colour, background)
        if box is not None:
            pixels = np.asarray(image, dtype=np.float64)
            near = [np.linalg.norm(pixels - np.array(COLOURS[name]), axis=-1) for name in (colour, background)]
            scores["shape_colour_right"] += nearest_colour(np.median(pixels[near[0] < near[1]], axis=0)) == colour
            overlap = {name: (box & known[name]).sum() / (box | known[name]).sum() for name in known}
            scores["shape_right"] += max(overlap, key=overlap.get) == shape
    return {**{name: value / count for name, value in scores.items()}, "count": count}


def sheet(rows: list[list[Image.Image]], gap: int = 4, zoom: int = 2) -> Image.Image:
    """Rows of pictures on one white sheet, enlarged."""
    width = max(sum(image.width + gap for image in row) for row in rows)
    height = sum(max(image.height for image in row) + gap for row in rows)
    paper, y = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        x = 0
        for image in row:
            paper.paste(image, (x, y))
            x += image.width + gap
        y += max(image.height for image in row) + gap
    return paper.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)


def draw_samples(base: Base, folder: Path) -> None:
    """The card's pictures: from captions, inpainting, wide canvases, the VAE's round trip."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = [
        ("red", "cyan"),
        ("yellow", "navy"),
        ("white", "green"),
        ("purple", "beige"),
        ("orange", "gray"),
        ("lime", "maroon"),
    ]
    prompts = [f"a large {a} {shape} on a {b} background" for (a, b), shape in zip(colours, SHAPES, strict=True)]
    prompts += ["vertical red and white stripes", "a gradient from blue at the top to yellow at the bottom"]
    prompts += ["a black brush stroke on a orange background", "white circle outline with black background"]
    prompts += [
        "a pink star left of a teal square on a navy background",
        "a small blue diamond at the top left on white",
    ]
    images = base.draw(prompts)
    sheet([images[:6], images[6:]]).save(folder / "captions.png")
    scenes = [make_scene(HELD_OUT, index) for index in range(100, 200)]
    masks = [make_mask(HELD_OUT, index, 64, 64) for index in range(100, 200)]
    chosen = [(s, m) for s, m in zip(scenes, masks, strict=True) if np.asarray(m).min() == 0][:10]
    answers = base.fill([s.image for s, _ in chosen], [m for _, m in chosen], [s.caption for s, _ in chosen])
    grey = [Image.composite(Image.new("RGB", s.image.size, (127, 127, 127)), s.image, m) for s, m in chosen]
    sheet([[s.image for s, _ in chosen], grey, answers]).save(folder / "inpaint.png")
    wide = [make_scene(HELD_OUT, index, 128, 64) for index in range(5)]
    right = Image.new("L", (128, 64), 0)
    right.paste(255, (64, 0, 128, 64))
    answers = base.fill([s.image for s in wide], [right] * 5, [s.caption for s in wide])
    blanked = [Image.composite(Image.new("RGB", (128, 64), (127, 127, 127)), s.image, right) for s in wide]
    sheet([[s.image for s in wide], blanked, answers]).save(folder / "wide.png")
    circles = [fill_circles.draw_target(c) for c in fill_circles.test_items({"unseen_pair": 5}, 64, 64, seed=0)]
    originals = [s.image for s in scenes[:5]] + circles
    sheet([originals, [base.round_trip(image) for image in originals]]).save(folder / "vae.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("nano"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base(options.base)
    draw_samples(base, options.base / "samples")
    values = {"vae": measure_vae(base), "holes": measure_holes(base), "captions": measure_captions(base)}
    rounded = json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 4))
    (options.base / "measurements.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
