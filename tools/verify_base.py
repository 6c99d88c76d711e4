"""Checks a base model end to end: for the first person who has the real FLUX.1 Fill weights.

    python tools/verify_base.py --base black-forest-labs/FLUX.1-Fill-dev --image photo.png --output_dir output/verify

1. Accounts for every tensor and checks the tokenizers.
2. Compares one step without LoRA with diffusers' own transformer on the same inputs.
3. Prints the loss at several noise levels against the band that a trained model must lie in.
4. Inpaints the middle of the picture and writes it.

It has been run on the nano base and on toys; on FLUX.1-Fill-dev by nobody yet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

import torch
from PIL import Image
from torch import Tensor

from library.conditioning.item import Condition
from library.config.tables.memory import MemoryTable
from library.config.tables.model import ModelTable
from library.errors import UserError
from library.flow.euler import SigmaSchedule
from library.flow.velocity import mix
from library.memory import allocator
from library.memory.device import choose_device, release
from library.models.base import Base
from library.models.predict import grid_ids, predict
from library.models.text import TextEmbeddings, wants_layerwise
from library.sampling.denoise import initial_noise, sample

LEVELS = (0.25, 0.5, 0.75, 0.9)
LOWEST_SHARE, HIGHEST_SHARE = 0.02, 1.0
"""A trained model's loss, as a share of the best that a model of Gaussian latents could do."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative difference from diffusers that counts as rounding."""


def gaussian_loss(variance: float, level: float) -> float:
    """The least mean squared velocity error for latents that are Gaussian of this variance, at noise level t.

    With z = (1 - t) x + t n and v = n - x: Var(v) - Cov(v, z)^2 / Var(z) = s^2 / ((1 - t)^2 s^2 + t^2).
    """
    return variance / ((1 - level) ** 2 * variance + level**2)


def picture(path: Path | None, side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]: the middle of the picture, or a generated one."""
    if path is None:
        ramp = torch.linspace(-1, 1, side)
        rings = torch.sin(6 * torch.sqrt(ramp[:, None] ** 2 + ramp[None] ** 2) * 3.14159)
        return torch.stack([ramp[:, None].expand(side, side), rings, ramp[None].expand(side, side)])[None]
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return values.permute(2, 0, 1)[None] / 127.5 - 1


def compare_with_diffusers(base: Base, ours: Tensor, given: dict, dtype: torch.dtype) -> float:
    """Largest difference from diffusers' transformer, relative to its largest value."""
    from diffusers import FluxTransformer2DModel

    file = base.transformer_file.reader.files[0]
    if base.transformer_file.is_diffusers:
        theirs = FluxTransformer2DModel.from_pretrained(file.parent, torch_dtype=dtype, local_files_only=True)
    else:
        theirs = FluxTransformer2DModel.from_single_file(str(file), torch_dtype=dtype)
    theirs = theirs.to(ours.device).eval()
    with torch.no_grad():
        expected = theirs(**given, return_dict=False)[0]
    del theirs
    release(ours.device)
    return float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())


def first_step(transformer, noisy: Tensor, text: TextEmbeddings, condition: Condition) -> tuple[Tensor, dict]:
    """Our prediction as tokens, and the same inputs under diffusers' names."""
    from library.flow.packing import pack_latents

    device, dtype = transformer.device, transformer.dtype
    tokens = torch.cat([pack_latents(noisy), condition.channels()], dim=-1).to(device, dtype)
    t, guidance = torch.tensor([0.5], device=device), torch.tensor([30.0], device=device)
    ids = grid_ids(*noisy.shape[-2:])
    embeddings = text.to(device, dtype)
    scale = guidance if transformer.shape.guidance else None
    with torch.no_grad():
        ours = transformer(tokens, embeddings.t5, embeddings.pooled, t, scale, ids)
    given = {
        "hidden_states": tokens, "encoder_hidden_states": embeddings.t5, "pooled_projections": embeddings.pooled,
        "timestep": t.to(dtype), "guidance": scale, "img_ids": ids.to(device, dtype),
        "txt_ids": torch.zeros(embeddings.t5.shape[1], 3, device=device, dtype=dtype),
    }  # fmt: skip
    return ours, given


def losses(transformer, latents: Tensor, text: TextEmbeddings, condition: Condition) -> dict[float, float]:
    """Mean squared velocity error of the picture at several noise levels."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    found = {}
    for level in LEVELS:
        t = torch.tensor([level], device=latents.device)
        with torch.no_grad():
            predicted = predict(transformer, mix(latents, noise, t), t, text, condition, 30.0)
        found[level] = float((predicted - (noise - latents)).square().mean())
    return found


def verify(base: Base, image: Path | None, output_dir: Path, side: int, prompt: str, compare: bool) -> bool:
    """Run every check; returns whether all of them passed."""
    device = choose_device(None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"transformer: {len(base.transformer_file.entries)} tensors, all accounted for; {base.shape}")
    encoders = base.load_text_encoders(device, dtype, wants_layerwise(None, device))
    length = base.defaults.t5xxl_max_token_length
    text = encoders.encode([prompt], length).embeddings
    del encoders
    release(device)
    vae = base.load_vae(device)
    pixels = picture(image, side)
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    latents = vae.encode(pixels)[0]
    condition = Condition(vae.encode(pixels * (1 - mask))[0], mask.to(device))
    transformer = base.load_transformer(device, dtype, MemoryTable())
    passed = _check_losses(transformer, latents, text, condition)
    schedule = SigmaSchedule.from_config(base.scheduler_config)
    result = sample(
        transformer, condition, text, initial_noise([0], condition), schedule=schedule,
        steps=base.defaults.sample_steps, guidance=base.defaults.sample_guidance_scale,
    )  # fmt: skip
    _write(vae.decode(result), output_dir / "inpainted.png")
    ours, given = first_step(transformer, latents, text, condition)
    del transformer
    release(device)
    if compare:
        difference = compare_with_diffusers(base, ours, given, dtype)
        same = difference <= TOLERANCE[dtype]
        print(f"one step against diffusers: relative difference {difference:.2e} ({'equal' if same else 'DIFFERENT'})")
        passed = passed and same
    print("everything passed" if passed else "SOMETHING IS WRONG: see above")
    return passed


def _check_losses(transformer, latents: Tensor, text: TextEmbeddings, condition: Condition) -> bool:
    variance, passed = float(latents.var()), True
    for level, loss in losses(transformer, latents, text, condition).items():
        bound = gaussian_loss(variance, level)
        inside = LOWEST_SHARE * bound <= loss <= HIGHEST_SHARE * bound
        passed = passed and inside
        print(
            f"sigma {level:.2f}: loss {loss:.4f}, expected {LOWEST_SHARE * bound:.4f} to {HIGHEST_SHARE * bound:.4f}"
            f" ({'ok' if inside else 'OUTSIDE'})"
        )
    return passed


def _write(pixels: Tensor, path: Path) -> None:
    values = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (values.shape[1], values.shape[0]), bytes(values.numpy().tobytes())).save(path)
    print(f"wrote {path}")


def main() -> int:
    """Returns 0 if everything passed, 1 if not, 2 if the base cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder, hub id or single file")
    parser.add_argument("--ae", type=Path, help="for a single file: its VAE")
    parser.add_argument("--clip_l", type=Path, help="for a single file: CLIP-L")
    parser.add_argument("--t5xxl", type=Path, help="for a single file: T5-XXL")
    parser.add_argument("--image", type=Path, help="a picture; one is generated if not given")
    parser.add_argument("--prompt", default="a photograph")
    parser.add_argument("--side", type=int, default=512, help="pixels, a multiple of 16")
    parser.add_argument("--output_dir", type=Path, default=Path("output/verify"))
    parser.add_argument("--no_diffusers", action="store_true", help="skip the comparison (it needs 24 GB of RAM)")
    given = parser.parse_args()
    allocator.configure()
    keys = {"ae": given.ae, "clip_l": given.clip_l, "t5xxl": given.t5xxl}
    try:
        base = Base.open(ModelTable(pretrained_model_name_or_path=given.base, **keys))
        passed = verify(base, given.image, given.output_dir, given.side, given.prompt, not given.no_diffusers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
