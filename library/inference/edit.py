"""Carries a plan out. The parts of the base are loaded one after the other: text encoders, VAE, transformer.

The text encoders are gone before the VAE is loaded and the VAE's encoder before the transformer, so that the largest
of them decides how much memory a call needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from library.conditioning import MODES
from library.conditioning.item import Condition
from library.config.run import Run
from library.config.tables import CacheTable
from library.errors import OutOfMemory
from library.flow.euler import SigmaSchedule
from library.inference.plan import Plan, Request
from library.memory.capability import DTYPES, capability_of, mixed_precision
from library.memory.device import choose_device, release
from library.models import feasible, setup
from library.models.base import Base
from library.models.flux import FluxTransformer
from library.models.text import TextEmbeddings, wants_layerwise
from library.models.vae import Parts, Vae
from library.networks.clip import merge_text
from library.networks.loading import apply_networks, load_network
from library.sampling.denoise import initial_noise, sample
from library.sampling.pixels import (
    finished,
    mask_pixels,
    picture_pixels,
    read_picture,
    save_png,
    to_bytes,
    with_unmasked,
)

PROMPTS_AT_ONCE = 8
VAE_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def edit(plan: Plan, run: Run, base: Base) -> None:
    """Make and write every result of the plan. Raises OutOfMemory with what to change if the device has too little."""
    device = choose_device(run.training.device)
    able = capability_of(device)
    dtype = DTYPES[mixed_precision(run.training.mixed_precision, able)]
    feasible.require(run.memory, base.shape, dtype, able)
    try:
        texts = _encode_prompts(plan, run.cache, base, device)
        conditions = _encode_conditions(plan, run.cache, base, device)
        transformer = setup.load(base.transformer_file, device, dtype, run.memory)
        setup.set_up_prediction(transformer, run.memory)
        _apply_networks(plan, transformer)
        vae = _load_vae(run.cache, base, device, "decoder")
        schedule = SigmaSchedule.from_config(base.scheduler_config)
        bar = tqdm(total=plan.steps * len(plan.requests), unit="step", disable=None)
        for batch in _batches(plan.requests, run.inference.inference_batch_size):
            condition = _joined([conditions[request.picture.path] for request in batch])
            latents = sample(
                transformer,
                condition,
                _joined_text([texts[request.picture.prompt] for request in batch]),
                initial_noise([request.seed for request in batch], condition),
                schedule=schedule,
                steps=plan.steps,
                guidance=plan.guidance,
                progress=partial(_advance, bar, len(batch)),
            )
            _write(plan, run, batch, latents, vae)
        bar.close()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the device ran out of memory ({str(error).splitlines()[0]}). Ways to need less, in this order: "
            'inference_batch_size = 1, vae_tiling = true, base_precision = "int8" or "nf4", blocks_to_swap, '
            "a smaller resolution, or vram_budget_gb, which chooses"
        ) from error


def _advance(bar: tqdm, count: int, step: int) -> None:
    bar.update(count)


def _load_vae(table: CacheTable, base: Base, device: torch.device, parts: Parts) -> Vae:
    return base.load_vae(device, VAE_PRECISIONS[table.vae_dtype], parts, table.vae_tiling)


def _encode_prompts(plan: Plan, table: CacheTable, base: Base, device: torch.device) -> dict[str, TextEmbeddings]:
    """Every distinct prompt's embeddings (a batch of one each), on the CPU."""
    dtype = torch.float32 if table.t5xxl_precision == "fp32" else torch.bfloat16
    layerwise = wants_layerwise(table.t5xxl_layer_by_layer, device)
    encoders = base.load_text_encoders(device, dtype, layerwise, table.t5xxl_precision)
    merge_text(encoders.clip, [(load_network(use.path), use.strength) for use in plan.networks])
    prompts = list(dict.fromkeys(request.picture.prompt for request in plan.requests))
    at_once = encoders.captions_at_once if layerwise else PROMPTS_AT_ONCE
    found = {}
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        encoded = encoders.encode(some, plan.token_length)
        t5, pooled = encoded.embeddings.t5.cpu(), encoded.embeddings.pooled.cpu()
        for row, (prompt, lost) in enumerate(zip(some, encoded.truncated)):
            found[prompt] = TextEmbeddings(t5[row : row + 1], pooled[row : row + 1])
            if lost:
                print(f"longer than {plan.token_length} tokens, not seen by the model: {lost}")
    del encoders
    release(device)
    return found


def _encode_conditions(plan: Plan, table: CacheTable, base: Base, device: torch.device) -> dict[object, Condition]:
    """Every picture's condition (a batch of one each), on the CPU."""
    vae = _load_vae(table, base, device, "encoder")
    mode = MODES[plan.mode]
    found: dict[object, Condition] = {}
    for request in plan.requests:
        picture = request.picture
        if picture.path in found:
            continue
        pixels = picture_pixels(read_picture(picture.path), request.fit)
        item = mode.request(pixels, mask_pixels(picture.mask, request.fit), plan.mode_settings)
        mean, _ = vae.encode(item.condition_pixels()[None])
        found[picture.path] = Condition(mean.cpu(), item.mask[None])
    del vae
    release(device)
    return found


def _apply_networks(plan: Plan, transformer: FluxTransformer) -> None:
    loaded = [(load_network(use.path), use.strength) for use in plan.networks]
    for network, _ in loaded:
        if network.unused:
            print(f"{network.path.name}: its text encoder network ({len(network.unused)} tensors) is not applied")
    apply_networks(transformer, loaded)


def _batches(requests: tuple[Request, ...], size: int) -> Iterator[list[Request]]:
    """Neighbouring requests of one canvas size, up to `size` at once."""
    for _, group in groupby(requests, key=lambda request: request.fit.canvas):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _joined(conditions: list[Condition]) -> Condition:
    return Condition(torch.cat([one.latents for one in conditions]), torch.cat([one.mask for one in conditions]))


def _joined_text(texts: list[TextEmbeddings]) -> TextEmbeddings:
    return TextEmbeddings(torch.cat([text.t5 for text in texts]), torch.cat([text.pooled for text in texts]))


def _write(plan: Plan, run: Run, batch: list[Request], latents: Tensor, vae: Vae) -> None:
    """Decode and save a batch."""
    mode = MODES[plan.mode]
    for request, one in zip(batch, latents):
        painted = to_bytes(mode.result(vae.decode(one[None])))[0].numpy()
        image = finished(painted, request.fit)
        if request.picture.mask is not None and run.inference.keep_unmasked:
            image = with_unmasked(image, request.picture.path, request.picture.mask, request.fit)
        save_png(image, request.output, plan.settings_of(request, base_name=run.model.pretrained_model_name_or_path))
