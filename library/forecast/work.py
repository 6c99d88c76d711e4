"""A configuration's heaviest moments, as the memory model counts them: batch, preview, validation, encoding pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from library.conditioning import MODES
from library.config.run import Run
from library.config.tables.dataset import DatasetTable
from library.data.buckets import Bucketing
from library.data.prompts import PreviewRequest, preview_requests
from library.models.base import Base
from library.models.cost import Encode, Picture, Work, tokens
from library.models.encoders import FLUX_ENCODERS, Encoders
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape
from library.networks.prospect import look_ahead
from library.networks.shapes import trained

ACTIVATION_BYTES = {"no": 4, "fp32": 4, "fp16": 2, "bf16": 2}
PRECISION_NAMES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
DEFAULT_LENGTH = 512
DEFAULT_STEPS = 50
HELD_OUT_BATCH = 4
"""As in library/data/cached.py."""

Size = tuple[int, int]


def largest_bucket(datasets: Sequence[DatasetTable], text: int = DEFAULT_LENGTH) -> tuple[int, int, int]:
    """(width, height, batch) of the batch with the most tokens, text included, that these data sets can give."""
    found = []
    for dataset in datasets:
        sizes = [
            size
            for resolution in dataset.sizes
            for size in Bucketing(
                resolution, dataset.enable_bucket, dataset.min_bucket_reso, dataset.max_bucket_reso,
                dataset.bucket_reso_steps, dataset.bucket_no_upscale,
            ).sizes()
        ]  # fmt: skip
        modes = {subset.mode for subset in dataset.subsets} or {"edit"}
        found += [(*MODES[mode].canvas(*size), dataset.train_batch_size) for mode in modes for size in sizes]
    return max(found, key=lambda bucket: bucket[2] * tokens(bucket[0], bucket[1], text), default=(512, 512, 1))


def text_length(run: Run) -> int:
    """T5's tokens."""
    return run.cache.t5xxl_max_token_length or DEFAULT_LENGTH


def work_of(run: Run, shape: FluxShape, processes: int = 1, encoders: Encoders = FLUX_ENCODERS) -> Work:
    """The heaviest step of this configuration, and the largest pictures made between steps."""
    with_clip = run.network.train_text_encoder
    settled = look_ahead(run.network, linear_shapes(shape), Base.open(run.model).clip_linears if with_clip else {})
    rank = max((target.rank for target in settled.targets), default=0)
    width, height, batch = largest_bucket(run.datasets, text_length(run))
    return Work(
        trained=trained(settled),
        rank=rank,
        optimizer=run.optimizer.optimizer_type,
        batch=batch,
        width=width,
        height=height,
        text=text_length(run),
        activation_bytes=ACTIVATION_BYTES[run.training.mixed_precision or "bf16"],
        optimizer_offload=run.memory.optimizer_offload,
        use_ema=run.training.use_ema,
        ema_on_device=run.training.use_ema and not run.training.ema_cpu,
        weight_bytes=2 if run.optimizer.full_bf16 else 4,
        micro_steps=run.training.gradient_accumulation_steps,
        processes=processes,
        clip=encoders.clip if with_clip else 0,
        preview=preview_picture(run),
        held_out=_held_out(run),
        encoders=encoders,
    )


def _picture(run: Run, size: Size, batch: int = 1, steps: int | None = None, decoded: bool = True) -> Picture:
    vae_bytes = ACTIVATION_BYTES[run.cache.vae_dtype]
    wanted = steps or run.sampling.sample_steps or DEFAULT_STEPS
    return Picture(*size, batch, vae_bytes, run.cache.vae_tiling, wanted, decoded)


def preview_picture(run: Run) -> Picture | None:
    """The largest preview; None without previews. A size that the data decides is taken to be the largest bucket's."""
    table = run.sampling
    if table.sample_prompts is not None and not table.sample_prompts.is_file():
        requests: Sequence[PreviewRequest] = (PreviewRequest(""),)  # the cache has them, and its sizes are the data's
    else:
        requests = preview_requests(table)
    requests = (*requests, *(PreviewRequest("") for _ in range(min(1, table.sample_items))))  # the data's own size
    sizes = [(_preview_size(request, run.datasets), request.steps) for request in requests]
    if not sizes:
        return None
    size, _ = max(sizes, key=lambda one: one[0][0] * one[0][1])
    return _picture(run, size, steps=max((steps or 0 for _, steps in sizes), default=0))


def _preview_size(request: PreviewRequest, datasets: Sequence[DatasetTable]) -> Size:
    """The whole canvas of a preview, in pixels. One side alone: completed by the image's aspect, else a square."""
    width, height = request.width, request.height
    if width is None and height is None:
        return largest_bucket([one.model_copy(update={"train_batch_size": 1}) for one in datasets])[:2]
    modes = [request.mode] if request.mode in MODES else [s.mode for one in datasets for s in one.subsets]
    across = max((MODES[mode].pictures_across for mode in modes), default=1)
    aspect = across * _aspect(request.image)
    return round(width or (height or 0) * aspect), round(height or (width or 0) / aspect)


def _aspect(image: Path | None) -> float:
    if image is None or not image.is_file():
        return 1.0
    from PIL import Image

    with Image.open(image) as opened:
        return opened.width / opened.height


def _held_out(run: Run) -> Picture | None:
    """The largest batch of held-out items."""
    measured = [
        dataset.model_copy(update={"train_batch_size": HELD_OUT_BATCH})
        for dataset in run.datasets
        if dataset.validation_split or any(subset.is_validation for subset in dataset.subsets)
    ]
    if not measured:
        return None
    *size, batch = largest_bucket(measured, text_length(run))
    return _picture(run, (size[0], size[1]), batch, decoded=bool(run.validation.validation_generate))


def painting_of(
    run: Run,
    canvases: Sequence[Size],
    batch: int,
    steps: int | None = None,
    text: int | None = None,
    network_files: Iterable[Path] = (),
    encoders: Encoders = FLUX_ENCODERS,
) -> Work:
    """Painting without training: the largest canvas (all that the model sees), and how many of it at once."""
    size = max(canvases, key=lambda canvas: canvas[0] * canvas[1])
    picture = _picture(run, size, max(1, min(batch, sum(canvas == size for canvas in canvases))), steps)
    return Work(
        trained=0,
        rank=0,
        optimizer="",
        batch=picture.batch,
        width=picture.width,
        height=picture.height,
        text=text or text_length(run),
        activation_bytes=ACTIVATION_BYTES[run.training.mixed_precision or "bf16"],
        preview=picture,
        trains=False,
        network_bytes=float(sum(path.stat().st_size for path in network_files)),
        encoders=encoders,
    )


def encode_of(
    run: Run,
    captions: int,
    canvases: Sequence[Size],
    layerwise: bool,
    images_at_once: int = 1,
    in_flight: int = 1,
    text: int | None = None,
) -> Encode:
    """An encoding pass over so many captions and pictures of these sizes."""
    width, height = max(canvases, key=lambda canvas: canvas[0] * canvas[1], default=(0, 0))
    return Encode(
        captions=captions,
        pixels=sum(canvas[0] * canvas[1] for canvas in canvases),
        width=width,
        height=height,
        text=text or text_length(run),
        layerwise=layerwise,
        text_precision=run.cache.t5xxl_precision,
        text_batch=run.cache.text_encoder_batch_size,
        images_at_once=images_at_once,
        vae_bytes=ACTIVATION_BYTES[run.cache.vae_dtype],
        tiling=run.cache.vae_tiling,
        pictures_in_flight=in_flight,
    )
