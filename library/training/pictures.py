"""Pictures a run makes of itself: previews of cached prompts, and held-out items painted and scored.

Held-out pictures are scored against what the VAE makes of their target's latents, so the VAE's own loss is no part of
the score. The VAE's decoder is in memory only while it decodes.
"""

import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from library.conditioning import MODES
from library.data.batches import Batch
from library.data.cached import CachedDataset
from library.data.plan import all_subsets
from library.errors import NonFiniteError
from library.memory.device import release
from library.models.base import Base
from library.models.flux import FluxTransformer
from library.models.text import TextEmbeddings
from library.previews import FOLDER, Previews, PreviewSettings
from library.sampling.denoise import Progress, initial_noise, sample
from library.sampling.pixels import save_png, to_bytes
from library.training.report import Column, Row
from library.training.scores import SCORES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gallery:
    """Pictures so far, as the report shows them."""

    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class HeldOutItem:
    """One held-out item's files."""

    caption: str
    stem: str
    folder: Path

    @property
    def source(self) -> Path:
        """What the model is shown."""
        return self.folder / f"{self.stem}_source.png"

    @property
    def target(self) -> Path:
        """What it should paint."""
        return self.folder / f"{self.stem}_target.png"

    def painted(self, step: int) -> Path:
        """What it painted at a step."""
        return self.folder / f"{self.stem}_{step:08d}.png"

    def pictures(self) -> dict[int, Path]:
        """Everything painted so far, by step."""
        pattern = re.compile(re.escape(self.stem) + r"_(\d{8})\.png")
        matches = [(pattern.fullmatch(path.name), path) for path in self.folder.glob(f"{self.stem}_*.png")]
        return {int(match[1]): path for match, path in matches if match}


class Painter:
    """Makes previews and held-out pictures of one run."""

    def __init__(
        self,
        dataset: CachedDataset,
        base: Base,
        settings: PreviewSettings,
        folder: Path,
        transformer: FluxTransformer,
        num_held_out: int,
        idle: bool = False,
        pooled: Callable[[Tensor], Tensor] | None = None,
        check: Progress | None = None,
    ):
        """idle: make nothing. pooled: CLIP's pooled vectors of token ids, where CLIP is trained as well.

        check: called after each step of denoising; what it raises ends the painting.
        """
        self.dataset, self.base, self.settings, self.transformer = dataset, base, settings, transformer
        self.folder = folder / FOLDER
        self.previews = Previews(() if idle else dataset.previews, base, settings, folder)
        self.previews.progress = self.check = check
        self.num_held_out = 0 if idle else num_held_out
        self.items: dict[str, HeldOutItem] = {}
        subsets = all_subsets(dataset.datasets)
        self._modes = {item.key: subsets[item.subset].mode for item in dataset.held_out_items}
        self.pooled = pooled
        self._lpips: Callable[[Tensor, Tensor], Tensor] | None = None

    def preview(self, step: int) -> dict[str, Path]:
        """Paint the previews of a step."""
        if not self.previews.cached:
            return {}
        if self.pooled is not None:
            self.previews.cached = tuple(
                replace(cached, text=self._text(cached.text, cached.text_entry)) for cached in self.previews.cached
            )
        return self.previews.make(self.transformer, step)

    def _text(self, cached: TextEmbeddings, fingerprint: str) -> TextEmbeddings:
        """The embeddings of a caption with the pooled vector that CLIP's network makes now."""
        ids = self.dataset.reader.read(fingerprint, "clip_ids")
        return TextEmbeddings(cached.t5, self._pooled(ids[None]))

    @torch.no_grad()
    def _pooled(self, clip_ids: Tensor) -> Tensor:
        assert self.pooled is not None
        return self.pooled(clip_ids).cpu()

    def score(self, step: int) -> dict[str, float]:
        """Paint held-out items and score them; the mean of each score."""
        if not self.num_held_out:
            return {}
        painted = [(batch, self._paint(batch)) for batch in self.dataset.held_out_batches(self.num_held_out)]
        release(self.transformer.device)
        totals: dict[str, list[float]] = {}
        try:
            self._score(painted, step, totals)
        except torch.OutOfMemoryError:
            log.warning("held-out items are not scored: the VAE found too little memory on the device")
        release(self.transformer.device)
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def _score(self, painted: list[tuple[Batch, Tensor | None]], step: int, totals: dict[str, list[float]]) -> None:
        vae = self.previews.load_decoder(self.transformer.device)
        for batch, latents in painted:
            for row in range(len(batch) if latents is not None else 0):
                for name, value in self._scored(vae, batch, latents, row, step).items():
                    totals.setdefault(f"validation_{name}", []).append(value)

    def _paint(self, batch: Batch) -> Tensor | None:
        settings = self.settings
        text = batch.text
        if self.pooled is not None:
            text = TextEmbeddings(text.t5, self._pooled(batch.clip_ids))
        seeds = [settings.seed + row for row in range(len(batch))]
        try:
            return sample(
                self.transformer, batch.condition, text, initial_noise(seeds, batch.condition),
                schedule=self.previews.schedule, steps=settings.steps, guidance=settings.guidance,
                progress=self.check,
            ).cpu()  # fmt: skip
        except NonFiniteError as error:
            log.warning("held-out items are not scored: %s", error)
        except torch.OutOfMemoryError:
            log.warning("held-out items are not scored: the device ran out of memory")
        release(self.transformer.device)
        return None

    def _scored(self, vae, batch: Batch, latents: Tensor, row: int, step: int) -> dict[str, float]:
        """Write one picture (and, once, its source and target), and score it."""
        key = batch.item_keys[row]
        item = self.items.setdefault(
            key, HeldOutItem(batch.captions[row], f"{self.settings.name}_val{len(self.items):02d}", self.folder)
        )
        crop = MODES[self._modes[key]].result
        target = crop(vae.decode(batch.mean[row : row + 1].float()))[0]
        painted = crop(vae.decode(latents[row : row + 1]))[0]
        if not item.target.exists():
            _write(target, item.target, item.caption)
            _write(vae.decode(batch.condition.latents[row : row + 1].float())[0], item.source, item.caption)
        _write(painted, item.painted(step), item.caption, **self._said(batch, row, key, step))
        a, b = ((pixels.float().cpu() / 2 + 0.5).clamp(0, 1) for pixels in (painted, target))
        return {name: score(a, b) for name, score in SCORES.items()} | self._perceptual(a, b)

    def _said(self, batch: Batch, row: int, key: str, step: int) -> dict[str, object]:
        """How a held-out picture was painted, for its file."""
        settings, (height, width) = self.settings, batch.condition.mask.shape[-2:]
        return {
            "mode": self._modes[key], "seed": settings.seed + row, "steps": settings.steps, "sampler": "euler",
            "guidance": settings.guidance, "size": f"{width}x{height}", "network": settings.name,
            "training step": step, "item": key,
        }  # fmt: skip

    def _perceptual(self, a: Tensor, b: Tensor) -> dict[str, float]:
        """LPIPS, where the `lpips` package is installed."""
        if importlib.util.find_spec("lpips") is None:
            return {}
        if self._lpips is None:
            import lpips

            self._lpips = lpips.LPIPS(net="alex", verbose=False)
        with torch.no_grad():
            return {"lpips": float(self._lpips(a[None] * 2 - 1, b[None] * 2 - 1))}

    def gallery(self) -> Gallery:
        """Previews first, then held-out items; one row for each step."""
        strips = [
            (Column(strip.prompt, strip.source, strip.target), strip.pictures) for strip in self.previews.strips()
        ]
        strips += [(Column(i.caption, i.source, i.target), i.pictures()) for i in self.items.values()]
        steps = sorted({step for _, pictures in strips for step in pictures})
        rows = tuple(Row(step, tuple(pictures.get(step) for _, pictures in strips)) for step in steps)
        return Gallery(tuple(column for column, _ in strips), rows)


def _write(pixels: Tensor, path: Path, caption: str, **said: object) -> None:
    save_png(Image.fromarray(to_bytes(pixels[None])[0].numpy()), path, {"prompt": caption, **said})
