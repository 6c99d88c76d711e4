"""Our inputs to the transformer, and our whole denoising run, against diffusers' FluxFillPipeline on the same files."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from PIL import Image
from torch import Tensor

from library.conditioning import MODES, ModeSettings
from library.conditioning.item import Condition
from library.config.tables import ModelTable
from library.flow.euler import SigmaSchedule
from library.models.base import Base
from library.sampling.denoise import initial_noise, sample
from library.sampling.pixels import to_bytes
from tests.oracle.reference import MASK_LENGTH, noisy_mask, noisy_picture, run_oracle
from tests.tiny import tiny_base

PROMPT = "make the red circle blue"
GUIDANCE = 7.5
STEPS = 4
SIZES = [(64, 64), (96, 64), (32, 80)]
CASES = [(mode, size) for mode in ("edit", "edit in a region", "mask", "spatial") for size in SIZES]


@dataclass
class Parts:
    """One base, loaded twice: as diffusers does and as InFlux does."""

    folder: Path
    pipeline: FluxFillPipeline
    base: Base
    vae: object
    transformer: object
    text: object


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tiny_base(tmp_path_factory.mktemp("oracle") / "base")
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(folder)))
    text = base.load_text_encoders().encode([PROMPT], MASK_LENGTH).embeddings
    pipeline = FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return Parts(folder, pipeline, base, base.load_vae(), base.load_transformer(), text)


def oracle_inputs(mode: str, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture and mask a user of FluxFillPipeline would pass for this mode."""
    width, height = image.size
    if mode == "spatial":
        canvas, half = Image.new("RGB", (2 * width, height)), Image.new("L", (2 * width, height))
        canvas.paste(image, (0, 0))
        half.paste(255, (width, 0, 2 * width, height))
        return canvas, half
    return image, Image.new("L", image.size, 255) if mode == "edit" else mask


def our_condition(parts: Parts, mode: str, image: Image.Image, mask: Image.Image) -> Condition:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1
    values = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, image.height, image.width)
    given = (values > 127).float() if mode in ("mask", "edit in a region") else None
    item = MODES[mode.split()[0]].request(pixels, given, ModeSettings())
    mean, _ = parts.vae.encode(item.condition_pixels()[None])
    return Condition(mean, item.mask[None])


def record_ours(parts: Parts, condition: Condition, noise: Tensor) -> tuple[Tensor, list[dict]]:
    """Our denoising run, with what the transformer was given at each step."""
    calls: list[dict] = []
    transformer, modulate = parts.transformer, parts.transformer.modulate

    def recorded(timestep, guidance, pooled):
        calls.append({"timestep": timestep, "guidance": guidance, "pooled": pooled})
        return modulate(timestep, guidance, pooled)

    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls[-1].update(tokens=args[0], text=args[1], ids=args[5]), with_kwargs=True
    )
    transformer.modulate = recorded
    try:
        schedule = SigmaSchedule.from_config(parts.base.scheduler_config)
        latents = sample(
            transformer, condition, parts.text, noise, schedule=schedule, steps=STEPS, guidance=GUIDANCE
        )  # fmt: skip
    finally:
        hook.remove()
        del transformer.modulate
    return latents, calls


@pytest.mark.parametrize("mode, size", CASES, ids=[f"{mode}-{w}x{h}" for mode, (w, h) in CASES])
def test_a_denoising_run_is_the_pipelines(parts: Parts, mode: str, size: tuple[int, int]) -> None:
    image, mask = noisy_picture(*size), noisy_mask(*size)
    condition = our_condition(parts, mode, image, mask)
    noise = initial_noise([3], condition)
    is_edit = mode.startswith("edit")
    oracle = run_oracle(
        parts.pipeline, *oracle_inputs(mode, image, mask), PROMPT, noise, edit=is_edit, guidance=GUIDANCE, steps=STEPS
    )
    latents, calls = record_ours(parts, condition, noise)

    assert len(calls) == len(oracle.calls) == STEPS
    for ours, theirs in zip(calls, oracle.calls):
        assert ours["tokens"].shape[-1] == 384
        close(ours["tokens"], theirs["hidden_states"])
        close(ours["timestep"], theirs["timestep"])
        close(ours["guidance"], theirs["guidance"])
        close(ours["pooled"], theirs["pooled_projections"])
        close(ours["text"], theirs["encoder_hidden_states"])
        assert torch.equal(ours["ids"], theirs["img_ids"])
        assert not theirs["txt_ids"].any()
    height, width = latents.shape[-2:]
    close(latents, FluxFillPipeline._unpack_latents(oracle.output, 8 * height, 8 * width, 8))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Float32 tolerance: the run is chaotic enough that a wrong channel would be off by orders of magnitude."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_oracle_notices_a_wrong_condition(parts: Parts) -> None:
    """The tolerance above is far below what a black mask, a blanked picture or another guidance would change."""
    image, mask = noisy_picture(64, 64), noisy_mask(64, 64)
    right = our_condition(parts, "edit", image, mask)
    noise = initial_noise([3], right)
    latents, _ = record_ours(parts, right, noise)
    black = Condition(right.latents, torch.zeros_like(right.mask))
    for wrong in (black, our_condition(parts, "mask", image, mask)):
        assert (record_ours(parts, wrong, noise)[0] - latents).abs().max() > 0.05


def test_the_picture_is_the_pipelines(parts: Parts) -> None:
    """Decoded and rounded: no pixel differs by more than one level of 255."""
    image, mask = noisy_picture(64, 96), noisy_mask(64, 96)
    condition = our_condition(parts, "mask", image, mask)
    noise = initial_noise([11], condition)
    oracle = run_oracle(
        parts.pipeline, image, mask, PROMPT, noise, edit=False, guidance=GUIDANCE, steps=STEPS, output_type="pil"
    )
    latents, _ = record_ours(parts, condition, noise)
    ours = to_bytes(parts.vae.decode(latents))[0]
    theirs = torch.frombuffer(bytearray(oracle.output[0].tobytes()), dtype=torch.uint8).view(ours.shape)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_batch_is_its_pictures(parts: Parts) -> None:
    """What else is in a batch changes nothing: noise is keyed to the picture's seed."""
    conditions = [our_condition(parts, "edit", noisy_picture(64, 64, seed), noisy_mask(64, 64)) for seed in (0, 1)]
    both = Condition(torch.cat([c.latents for c in conditions]), torch.cat([c.mask for c in conditions]))
    text = type(parts.text)(parts.text.t5.expand(2, -1, -1), parts.text.pooled.expand(2, -1))
    schedule = SigmaSchedule.from_config(parts.base.scheduler_config)
    settings = {"schedule": schedule, "steps": STEPS, "guidance": GUIDANCE}
    together = sample(parts.transformer, both, text, initial_noise([5, 6], both), **settings)
    for seed, condition, made in zip((5, 6), conditions, together):
        alone = sample(parts.transformer, condition, parts.text, initial_noise([seed], condition), **settings)
        torch.testing.assert_close(alone[0], made, rtol=1e-4, atol=1e-5)
