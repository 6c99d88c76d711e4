"""The words of `--dry_run`: VRAM and RAM by phase, disk, and time, for each of the three commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from library.config.run import Run
from library.forecast.choice import Device, layerwise, setting_of, settle, this_card
from library.forecast.work import Size, encode_of
from library.models import cost
from library.models.cost import GB, Card, Memory, Setting, Work
from library.models.encoders import FLUX_ENCODERS, Encoders
from library.models.machine import Machine
from library.models.shape import FluxShape

LEAST_SHOWN = 0.005 * GB
ESTIMATE = "An estimate from peak figures, not a measurement."
PNG_BYTES = 3
"""Of a pixel, at most: results are PNG files in 8-bit RGB."""


def training_lines(
    run: Run,
    shape: FluxShape,
    work: Work,
    card: Card | None = None,
    machine: Machine | None = None,
) -> list[str]:
    """What the training command will need, and about how long it will take. work: of work_of."""
    run, lines = settle(run, shape, card, machine, work)
    setting = setting_of(run, shape)
    lines.append(
        f"largest batch: {work.batch} x {work.width} x {work.height} pixels, {work.text} text tokens;"
        f" {work.trained / 1e6:.1f} M trained parameters"
    )
    lines += memory_lines("VRAM", cost.training_phases(shape, setting, work))
    each = f" in each of {work.processes} processes" if work.processes > 1 else ""
    lines += memory_lines(f"RAM{each}", {"training": cost.training_ram(shape, setting, work)})
    state = (4 + cost.OPTIMIZER_BYTES.get(work.optimizer, 8) + cost.PAGED_BYTES.get(work.optimizer, 0)) * work.trained
    state += 4 * work.trained if work.use_ema else 0
    lines.append(f"disk: {state / GB:.2f} GB per state; the sizes of the networks stand with their names")
    return [*lines, _training_time(run, shape, setting, work, card or this_card().card)]


def memory_lines(what: str, phases: Mapping[str, Memory]) -> list[str]:
    """The largest phase with its parts, and what the others need."""
    name, most = cost.largest(phases)
    lines = [f"{what}: {most.total / GB:.2f} GB" + (f" (largest phase: {name})" if len(phases) > 1 else "")]
    lines += [f"  {bytes_ / GB:6.2f}  {part}" for part, bytes_ in most.parts.items() if bytes_ >= LEAST_SHOWN]
    others = [f"{other} {memory.total / GB:.2f}" for other, memory in phases.items() if other != name]
    return [*lines, f"  other phases: {', '.join(others)} GB"] if others else lines


def _training_time(run: Run, shape: FluxShape, setting: Setting, work: Work, card: Card | None) -> str:
    if cost.is_toy(shape):
        return "time: not estimated (the base is a toy)"
    known = card or cost.REFERENCE_CARD
    seconds = cost.step_seconds(shape, setting, work, known) * work.micro_steps
    steps = run.training.max_train_steps
    hours = f", {seconds * steps / 3600:.1f} hours for {steps} steps" if steps else ""
    preview = ""
    if work.preview is not None:
        taken = cost.painting_seconds(shape, setting, work.preview, work.text, known)
        preview = f" without previews ({taken:.0f} s each)"
    return f"time: about {seconds:.1f} s per step{hours}{preview} on {_card_words(card)}. {ESTIMATE}"


def _card_words(card: Card | None) -> str:
    return card.name if card else f"{cost.REFERENCE_CARD.name} (no known card found here)"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def caching_lines(
    run: Run,
    captions: int,
    canvases: Sequence[Size],
    num_bytes: int,
    free: float,
    in_flight: int = 2,
    encoders: Encoders = FLUX_ENCODERS,
    shape: FluxShape | None = None,
    class_images: Work | None = None,
    device: Device | None = None,
) -> list[str]:
    """What the caching command will need: `captions` distinct captions and pictures of these sizes are to be encoded.

    shape, class_images: the base that paints class images and what it paints, if there are any to make.
    """
    device = device or this_card()
    encode = encode_of(run, captions, canvases, layerwise(run, device), run.cache.vae_batch_size, in_flight)
    vram, ram = cost.caching_phases(encode, encoders), cost.caching_ram(encode, encoders)
    if class_images is not None and shape is not None:
        setting = setting_of(run, shape)
        for found, more in (
            (vram, cost.inference_phases(shape, setting, class_images)),
            (ram, cost.inference_ram(shape, setting, class_images)),
        ):
            found |= {f"class images, {name}": memory for name, memory in more.items()}
    lines = [f"largest batch of the VAE: {encode.images_at_once} x {encode.width} x {encode.height} pixels"]
    lines = (lines if encode.pixels else []) + memory_lines("VRAM", vram) + memory_lines("RAM", ram)
    lines.append(f"disk: {num_bytes / GB:.2f} GB to write, {free / GB:.1f} GB free")
    if encoders.t5 < cost.FULL_MODEL:
        return [*lines, "time: not estimated (the base is a toy)"]
    texts, images = cost.encoding_seconds(encode, device.card or cost.REFERENCE_CARD, encoders)
    beside = ", class images not counted" if class_images is not None else ""
    return [
        *lines,
        f"time: about {_duration(texts)} for {captions} captions and {_duration(images)} for {len(canvases)} pictures"
        f" on {_card_words(device.card)}{beside}. {ESTIMATE}",
    ]


def inference_lines(
    run: Run,
    shape: FluxShape,
    work: Work,
    captions: int,
    canvases: Sequence[Size],
    results: Mapping[Path, Size],
    device: Device | None = None,
) -> list[str]:
    """What the inference command will need and take.

    captions: distinct prompts. canvases: of the distinct pictures that are encoded. results: size of each file made.
    """
    assert work.preview is not None
    device = device or this_card()
    setting = setting_of(run, shape)
    encode = encode_of(run, captions, canvases, layerwise(run, device), text=work.text)
    picture = work.preview
    lines = [f"largest batch: {picture.batch} x {picture.width} x {picture.height} pixels, {work.text} text tokens"]
    lines += memory_lines("VRAM", cost.inference_phases(shape, setting, work, encode))
    lines += memory_lines("RAM", cost.inference_ram(shape, setting, work, encode))
    size = PNG_BYTES * sum(width * height for width, height in results.values())
    lines.append(f"disk: at most {size / GB:.3f} GB for {len(results)} pictures")
    if cost.is_toy(shape):
        return [*lines, "time: not estimated (the base is a toy)"]
    seconds = cost.painting_seconds(shape, setting, picture, work.text, device.card or cost.REFERENCE_CARD)
    each = seconds / picture.batch
    return [
        *lines,
        f"time: about {each:.0f} s per picture, {_duration(each * len(results))} for {len(results)}, beside loading,"
        f" on {_card_words(device.card)}. {ESTIMATE}",
    ]
