"""Class images for prior preservation: what the base itself paints for class_prompt, made where there are too few.

They are painted from a blank condition and a full mask, by the function that paints previews and inference, and train
as `mask` items with a full mask. Existing images are never replaced.
"""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm import tqdm

from library import forecast
from library.caching.encode import DTYPES, encode_previews, encode_texts
from library.data.batches import Choice, Gatherer
from library.data.manifest import Text
from library.data.plan import bucketings
from library.data.previews import PlannedPreview, plan_previews
from library.data.prompts import PreviewRequest
from library.data.reader import Reader
from library.data.report import Report
from library.files import atomic_write
from library.flow.draws import key_seed
from library.flow.euler import SigmaSchedule
from library.memory.capability import DTYPES as ACTIVATIONS
from library.memory.capability import capability_of, mixed_precision
from library.memory.device import choose_device, release
from library.models import feasible
from library.sampling.denoise import initial_noise, sample
from library.sampling.pixels import to_bytes

if TYPE_CHECKING:
    from library.caching.session import Session
    from library.conditioning.item import Condition
    from library.config.run import Run
    from library.data.ledger import Ledger
    from library.models.text import TextEmbeddings

log = logging.getLogger("influx")


def generate(session: Session, numbers: list[int], ledger: Ledger) -> None:
    """Paint the class images of these numbers into class_data_dir. Their seeds follow from the run's and the number."""
    cache = session.run.cache
    assert cache.class_data_dir is not None
    run, device, dtype = _feasible(session)
    preview = _request(session, ledger)
    encode_texts(session, [text for text in preview.texts if session.texts.fingerprint(text) not in session.store])
    encode_previews(session, [preview] if preview.fingerprint not in session.store else [])
    condition, text = _encoded(session, preview)
    latents = _painted(session, run, device, dtype, numbers, condition, text)
    vae = session.base.load_vae(device, DTYPES[cache.vae_dtype], parts="decoder")
    for number, latent in zip(numbers, latents, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(to_bytes(vae.decode(latent[None]))[0].numpy()).save(buffer, "PNG")
        atomic_write(cache.class_data_dir / f"class_{number:05}.png", buffer.getvalue())
    log.info("made %d class images in %s", len(numbers), cache.class_data_dir)


def _request(session: Session, ledger: Ledger) -> PlannedPreview:
    run = session.run
    bucketing = bucketings(run.datasets[0])[0]
    request = PreviewRequest(
        run.cache.class_prompt or "", width=bucketing.size[0], height=bucketing.size[1], mode="mask"
    )
    pixels = run.cache.max_image_pixels
    report = Report()
    (preview,) = plan_previews((request,), run.datasets, bucketing, session.images, ledger, pixels, {}, report)
    return preview


def _encoded(session: Session, preview: PlannedPreview) -> tuple[Condition, TextEmbeddings]:
    reader = Reader(session.store)
    gatherer = Gatherer(reader)
    words = Text(session.texts.fingerprint(preview.request.prompt), preview.request.prompt)
    condition = gatherer.condition([Choice("", preview.fingerprint, 0, words, 1.0)])
    text = gatherer.text(words.fingerprint)
    reader.close()
    return condition, text


def _feasible(session: Session) -> tuple[Run, torch.device, torch.dtype]:
    """The run with its memory settings chosen, and where and in what it computes; refused before anything is loaded."""
    device = choose_device(session.run.training.device)
    able = capability_of(device)
    run, lines = forecast.settle(session.run, session.base.shape)
    if lines:
        log.info("%s", "\n".join(lines))
    wanted = run.cache.prior_generation_precision or run.training.mixed_precision
    dtype = ACTIVATIONS[mixed_precision("no" if wanted == "fp32" else wanted, able)]
    feasible.require(run.memory, session.base.shape, dtype, able)
    return run, device, dtype


def _painted(
    session: Session,
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    numbers: list[int],
    condition: Condition,
    text: TextEmbeddings,
) -> list[torch.Tensor]:
    """The latents of all images, on the CPU; the transformer is gone from memory afterwards."""
    base = session.base
    transformer = base.load_transformer(device, dtype, run.memory)
    guidance = run.sampling.sample_guidance_scale
    latents: list[torch.Tensor] = []
    size = run.cache.sample_batch_size
    with tqdm(total=len(numbers), desc="class images", unit="image", disable=None) as bar:
        for start in range(0, len(numbers), size):
            chunk = numbers[start : start + size]
            batch = replace(
                condition,
                latents=condition.latents.expand(len(chunk), -1, -1, -1),
                mask=condition.mask.expand(len(chunk), -1, -1, -1),
            )
            seeds = [key_seed(session.scope.seed, "class image", number) for number in chunk]
            latents += sample(
                transformer,
                batch,
                replace(text, t5=text.t5.expand(len(chunk), -1, -1), pooled=text.pooled.expand(len(chunk), -1)),
                initial_noise(seeds, batch),
                schedule=SigmaSchedule.from_config(base.scheduler_config),
                steps=run.sampling.sample_steps or base.defaults.sample_steps,
                guidance=base.defaults.sample_guidance_scale if guidance is None else guidance,
            ).cpu()
            bar.update(len(chunk))
    del transformer
    release(device)
    return latents
