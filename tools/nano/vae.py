"""Trains the nano VAE: first encoder and decoder together, then the decoder alone on frozen latents.

    python -m tools.nano.vae --work_dir output/nano --steps 6000 --replicas 2
    python -m tools.nano.vae --work_dir output/nano --steps 12000 --decoder_only

Run the same command again to continue. The posterior has a fixed standard deviation: learning it from a random start
stalls (measured), and a fixed one makes the decoder tolerate what a flow model gets slightly wrong.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.nano.masks import blank, make_mask
from tools.nano.replicas import Log, average_gradients, launch, save_atomically, world_size
from tools.nano.scenes import make_scene

POSTERIOR_STD = 0.1
DECODER_STD = 0.4
"""The decoder alone learns under noise of up to this standard deviation."""
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 64,
}
SHAPES = {(64, 64, 0): 0.42, (64, 64, 32): 0.38, (128, 64, 0): 0.12, (96, 96, 0): 0.05, (128, 128, 0): 0.03}
"""Scene width, height and crop (0: whole) with their shares; every batch holds about as many pixels."""
PIXELS_PER_BATCH = 12 * 64 * 64


def new_vae(seed: int) -> AutoencoderKL:
    """An untrained VAE whose log-variance channels are constant."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = 2 * math.log(POSTERIOR_STD)
    return vae.to(memory_format=torch.channels_last)


def to_pixels(image: object) -> np.ndarray:
    """A PIL image as float32 (height, width, channels) in [-1, 1]."""
    return np.asarray(image, dtype=np.float32) / 127.5 - 1


def draw_batch(step: int, rank: int, seed: int) -> torch.Tensor:
    """Pixels (batch, 3, height, width) of one step; some scenes have wild colours, some are blanked by a mask."""
    rng = random.Random(f"vae:{seed}:{rank}:{step}")
    width, height, crop = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
    side = crop or None
    count = max(1, PIXELS_PER_BATCH // (crop * crop if crop else width * height))
    pictures = []
    for _ in range(count):
        index = rng.randrange(1 << 40)
        pixels = to_pixels(make_scene(seed, index, width, height, any_colour=rng.random() < 0.3).image)
        if rng.random() < 0.15:
            mask = np.asarray(make_mask(seed, index, width, height), dtype=np.float32)[..., None] / 255
            pixels = blank(pixels, mask)
        if side:
            x, y = rng.randrange(width - side + 1), rng.randrange(height - side + 1)
            pixels = pixels[y : y + side, x : x + side]
        pictures.append(pixels)
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Squared error for PSNR plus absolute error, which keeps flat areas exact."""
    return torch.nn.functional.mse_loss(decoded, pixels) + 0.3 * torch.nn.functional.l1_loss(decoded, pixels)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, then a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@torch.no_grad()
def validate(vae: AutoencoderKL, count: int = 64) -> float:
    """Mean PSNR in dB of the round trip of held-out 64-pixel scenes."""
    images = [make_scene(-1, index).image for index in range(count)]
    pixels = torch.from_numpy(np.stack([to_pixels(image) for image in images])).permute(0, 3, 1, 2)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * errors.log10()).mean())


def train(rank: int, options: argparse.Namespace) -> None:
    """One replica of the training loop; continues from the checkpoint of its stage if there is one."""
    stage = "vae_decoder" if options.decoder_only else "vae_joint"
    path = options.work_dir / f"{stage}.pt"
    vae = new_vae(options.seed)
    if options.decoder_only:
        vae.load_state_dict(torch.load(options.work_dir / "vae_joint.pt")["model"])
        vae.encoder.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["cpu_seconds"]
    log = Log(options.work_dir / "training_log.jsonl", rank, spent)
    running = 0.0
    for step in range(first, options.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, options.steps, options.learning_rate)
        loss = step_loss(vae, draw_batch(step, rank, options.seed), step * world_size() + rank, options.decoder_only)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            mean = round(running / options.save_every, 5)
            log.write(stage=stage, step=step + 1, loss=mean, psnr=round(validate(vae), 2))
            running = 0.0
            if rank == 0:
                state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_atomically({**state, "cpu_seconds": log.cpu_seconds()}, path)


def step_loss(vae: AutoencoderKL, pixels: torch.Tensor, noise_seed: int, decoder_only: bool) -> torch.Tensor:
    """The loss of one batch; the weak pull towards zero balances the fixed posterior noise."""
    with torch.set_grad_enabled(not decoder_only):
        latents = vae.encode(pixels).latent_dist.mean
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(latents.shape, generator=generator)
    level = DECODER_STD * torch.rand(len(noise), 1, 1, 1, generator=generator) if decoder_only else POSTERIOR_STD
    decoded = vae.decode(latents + level * noise).sample
    return reconstruction_loss(decoded, pixels) + 1e-3 * latents.square().mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/nano"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--decoder_only", action="store_true")
    options = parser.parse_args()
    launch(train, options.replicas, options)


if __name__ == "__main__":
    main()
