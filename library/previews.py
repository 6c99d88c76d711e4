"""Pictures made while training: cached prompts and conditions -> PNGs and one growing table of them.

No text encoder is ever needed, and the VAE's decoder is in memory only while it decodes. A preview that cannot be made
(out of memory, a picture of NaN) is reported and left out: it never ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.conditioning import MODES
from library.data.cached import CachedPreview
from library.errors import NonFiniteError
from library.files import atomic_write
from library.flow.euler import SigmaSchedule
from library.memory.device import release
from library.models.base import Base
from library.models.flux import FluxTransformer
from library.models.probe import zeros
from library.models.vae import Vae
from library.sampling.denoise import Progress, initial_noise, sample
from library.sampling.pixels import save_png, to_bytes

log = logging.getLogger(__name__)

FOLDER = "sample"
TABLE = "previews.png"
CELL = 256
LINE = 18
LABEL = 90
MOST_ROWS = 32  # more cannot be looked at, and the table is written again each time; the files keep all


@dataclass(frozen=True)
class PreviewSettings:
    """What previews are made with where their own line does not say it."""

    steps: int
    guidance: float
    seed: int
    name: str
    vae_dtype: torch.dtype = torch.float32
    vae_tiling: bool = False


@dataclass(frozen=True)
class Strip:
    """One preview through the run: its prompt, what the model is shown, its pictures by step, and what it should become
    where the data says so."""

    prompt: str
    source: Path
    pictures: dict[int, Path]
    target: Path | None = None


class Previews:
    """The previews of one run. Pictures of earlier steps are found again by their names, so a resumed run goes on."""

    def __init__(self, cached: Sequence[CachedPreview], base: Base, settings: PreviewSettings, folder: Path):
        self.cached = cached
        self.base = base
        self.settings = settings
        self.folder = folder / FOLDER
        self.table = folder / TABLE
        self.schedule = SigmaSchedule.from_config(base.scheduler_config)
        self.progress: Progress | None = None

    def make(self, transformer: FluxTransformer, step: int) -> dict[str, Path]:
        """Paint every preview as of `step`, and the table; returns the new pictures by name."""
        latents = {}
        for number, preview in enumerate(self.cached):
            painted = self._paint(transformer, number, preview)
            if painted is not None:
                latents[number] = painted.cpu()
        release(transformer.device)
        made: dict[str, Path] = {}
        try:
            self._decode(latents, transformer.device, step, made)
        except torch.OutOfMemoryError:
            log.warning("previews are left out: the VAE found too little memory on the device; make them smaller")
        release(transformer.device)
        if made:
            self._write_table()
        return made

    def strips(self) -> list[Strip]:
        """Everything painted so far, one strip for each preview."""
        return [
            Strip(
                preview.request.prompt,
                self._source_path(number),
                self._pictures(number),
                None if preview.target is None else self._target_path(number),
            )
            for number, preview in enumerate(self.cached)
        ]

    def _seed(self, preview: CachedPreview) -> int:
        own = preview.request.seed
        return (self.settings.seed if own is None else own) + preview.request.copy

    def _steps_and_guidance(self, preview: CachedPreview) -> tuple[int, float]:
        request, settings = preview.request, self.settings
        return request.steps or settings.steps, settings.guidance if request.guidance is None else request.guidance

    def _paint(self, transformer: FluxTransformer, number: int, preview: CachedPreview) -> Tensor | None:
        """The latents of one preview, or None if it could not be made."""
        steps, guidance = self._steps_and_guidance(preview)
        scale = preview.request.cfg_scale
        negative = None if preview.negative is None or scale in (None, 1) else (preview.negative, scale)
        try:
            return sample(
                transformer,
                preview.condition,
                preview.text,
                initial_noise([self._seed(preview)], preview.condition),
                schedule=self.schedule,
                steps=steps,
                guidance=guidance,
                negative=negative,
                progress=self.progress,
            )
        except NonFiniteError as error:
            log.warning("preview %d is left out: %s", number + 1, error)
        except torch.OutOfMemoryError:
            log.warning("preview %d is left out: the device ran out of memory; make it smaller (--w, --h)", number + 1)
        release(transformer.device)
        return None

    def _decode(self, latents: dict[int, Tensor], device: torch.device, step: int, made: dict[str, Path]) -> None:
        """Write the pictures of `latents` (into `made` by name) and, once, what each preview starts from."""
        if not latents:
            return
        vae = self.load_decoder(device)
        for number, painted in latents.items():
            preview = self.cached[number]
            self._decode_given(vae, number, preview)
            pixels = to_bytes(MODES[preview.mode].result(vae.decode(painted)))[0]
            path = self.folder / f"{self._stem(number)}_{step:08d}.png"
            save_png(Image.fromarray(pixels.numpy()), path, self._said(preview, step))
            made[path.stem] = path

    def _decode_given(self, vae: Vae, number: int, preview: CachedPreview) -> None:
        """Once: what a preview starts from, and what it should become."""
        said = {"prompt": preview.request.prompt}
        if not self._source_path(number).exists():
            shown = to_bytes(vae.decode(preview.condition.latents))[0]
            save_png(Image.fromarray(shown.numpy()), self._source_path(number), said)
        if preview.target is not None and not self._target_path(number).exists():
            shown = to_bytes(MODES[preview.mode].result(vae.decode(preview.target)))[0]
            save_png(Image.fromarray(shown.numpy()), self._target_path(number), said)

    def load_decoder(self, device: torch.device) -> Vae:
        """The VAE's decoder as previews use it."""
        settings = self.settings
        return self.base.load_vae(device, settings.vae_dtype, parts="decoder", tiling=settings.vae_tiling)

    def _said(self, preview: CachedPreview, step: int) -> dict[str, object]:
        steps, guidance = self._steps_and_guidance(preview)
        height, width = preview.condition.mask.shape[-2:]
        negative, scale = preview.request.negative, preview.request.cfg_scale
        return {
            "prompt": preview.request.prompt,
            **({} if negative is None or scale in (None, 1) else {"negative prompt": negative, "cfg scale": scale}),
            "mode": preview.mode,
            "seed": self._seed(preview),
            "steps": steps,
            "sampler": "euler",
            "guidance": guidance,
            "size": f"{width}x{height}",
            "network": self.settings.name,
            "training step": step,
        }

    def _stem(self, number: int) -> str:
        return f"{self.settings.name}_{number:02d}"

    def _source_path(self, number: int) -> Path:
        return self.folder / f"{self._stem(number)}_source.png"

    def _target_path(self, number: int) -> Path:
        return self.folder / f"{self._stem(number)}_target.png"

    def _pictures(self, number: int) -> dict[int, Path]:
        pattern = re.compile(re.escape(self._stem(number)) + r"_(\d{8})\.png")
        found = {}
        for path in sorted(self.folder.glob("*.png")) if self.folder.is_dir() else ():
            match = pattern.fullmatch(path.name)
            if match:
                found[int(match.group(1))] = path
        return found

    def _write_table(self) -> None:
        picture = draw_table(self.strips())
        atomic_write(self.table, lambda path: picture.save(path, "PNG"))


@dataclass(frozen=True)
class Trial:
    """A picture of zeros, to see whether it fits beside a run: width and height of all that the model sees."""

    transformer: FluxTransformer
    previews: Previews
    width: int
    height: int
    batch: int = 1

    def denoise(self, text_length: int) -> None:
        """One step of denoising. Raises whatever running out of memory raises."""
        condition, text = zeros(self.transformer, self.width, self.height, self.batch, text_length)
        with contextlib.suppress(NonFiniteError):  # a picture of zeros: only its memory counts
            sample(
                self.transformer, condition, text, condition.latents,
                schedule=self.previews.schedule, steps=1, guidance=self.previews.settings.guidance,
            )  # fmt: skip
        del condition, text
        release(self.transformer.device)

    def decode(self) -> None:
        """The VAE's decoder on one picture."""
        device = self.transformer.device
        condition, _ = zeros(self.transformer, self.width, self.height, 1, 1)
        self.previews.load_decoder(device).decode(condition.latents)
        del condition
        release(device)


def shown_steps(steps: Sequence[int]) -> list[int]:
    """The steps a table has rows for: all, or some of them spread evenly, always with the first and the last."""
    if len(steps) <= MOST_ROWS:
        return list(steps)
    return [steps[round(row * (len(steps) - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS)]


def draw_table(strips: Sequence[Strip]) -> Image.Image:
    """Steps down, prompts across, and above all what each preview starts from and, where it is known, should become."""
    steps = shown_steps(sorted({step for strip in strips for step in strip.pictures}))
    rows: list[tuple[str, list[Path | None]]] = [("source", [strip.source for strip in strips])]
    if any(strip.target for strip in strips):
        rows.append(("target", [strip.target for strip in strips]))
    rows += [(f"step {step}", [strip.pictures.get(step) for strip in strips]) for step in steps]
    pictures = [(label, [_cell(path) for path in paths]) for label, paths in rows]
    heights = [max((cell.height for cell in cells if cell), default=LINE) + 4 for _, cells in pictures]
    table = Image.new("RGB", (LABEL + len(strips) * (CELL + 4), LINE + sum(heights)), "white")
    pen, font = ImageDraw.Draw(table), ImageFont.load_default(13)
    for column, strip in enumerate(strips):
        pen.text((LABEL + column * (CELL + 4), 2), _shortened(strip.prompt, font), "black", font)
    top = LINE
    for (label, cells), height in zip(pictures, heights):
        pen.text((4, top + 4), label, "black", font)
        for column, cell in enumerate(cells):
            if cell is not None:
                table.paste(cell, (LABEL + column * (CELL + 4), top))
        top += height
    return table


def _cell(path: Path | None) -> Image.Image | None:
    """A picture at the width of a column; one that has been removed leaves its place empty."""
    if path is None or not path.exists():
        return None
    with Image.open(path) as image:
        size = (CELL, max(1, round(image.height * CELL / image.width)))
        nearest = image.width < CELL
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > CELL:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-3].rstrip() + "…"
    return text
