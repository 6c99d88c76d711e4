"""Scenes as the transformer sees them: latents of picture and blanked picture, mask, and text embeddings, in memory."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tools.nano.masks import blank, make_mask
from tools.nano.replicas import save_atomically
from tools.nano.scenes import make_scene
from tools.nano.texts import clip_ids, dress, t5_ids
from tools.nano.vae import POSTERIOR_STD, new_vae, to_pixels

SIZES = {(64, 64): 0.58, (128, 64): 0.22, (64, 128): 0.05, (96, 96): 0.07, (128, 128): 0.04, (96, 64): 0.04}
"""Width and height with the share of training steps."""
CAPTION_DROPOUT = 0.08


@dataclass
class Encoders:
    """The frozen parts, and the statistics that bring latents to zero mean and unit variance."""

    vae: AutoencoderKL
    t5: T5EncoderModel
    t5_tokenizer: T5TokenizerFast
    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    shift: float
    scale: float

    @torch.no_grad()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised mean latents (batch, 16, height / 8, width / 8) of pixels (batch, 3, height, width) in [-1, 1]."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return ((self.vae.encode(pixels).latent_dist.mean - self.shift) * self.scale).contiguous()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 states (batch, 16, 96) and CLIP's pooled vectors (batch, 64)."""
        states = self.t5(t5_ids(self.t5_tokenizer, captions)).last_hidden_state
        # CLIP is causal and pools at its end token: pads after it change nothing, so the longest caption is enough.
        ids = clip_ids(self.clip_tokenizer, captions)
        used = int((ids != self.clip_tokenizer.eos_token_id).sum(dim=1).max()) + 1
        return states, self.clip(ids[:, :used]).pooler_output


def load_encoders(work_dir: Path) -> Encoders:
    """The encoders that texts.py and vae.py left in the working folder."""
    vae = new_vae(0)
    vae.load_state_dict(torch.load(work_dir / "vae_joint.pt")["model"])
    shift, scale = measure_latents(vae)
    return Encoders(
        vae.eval(),
        T5EncoderModel.from_pretrained(work_dir / "text_encoder_2").eval(),
        T5TokenizerFast.from_pretrained(work_dir / "tokenizer_2"),
        CLIPTextModel.from_pretrained(work_dir / "text_encoder").eval(),
        CLIPTokenizer.from_pretrained(work_dir / "tokenizer"),
        shift,
        scale,
    )


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, count: int = 512) -> tuple[float, float]:
    """Mean and 1 / standard deviation of the latents of held-out scenes, rounded to four digits."""
    pixels = np.stack([to_pixels(make_scene(-2, index).image) for index in range(count)])
    latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mean
    return round(float(latents.mean()), 4), round(1 / float(latents.std()), 4)


@dataclass
class Batch:
    """Tensors of one batch; every picture has the same size."""

    latents: torch.Tensor
    condition: torch.Tensor
    mask: torch.Tensor
    """(batch, height, width), 1 = repaint"""
    text: torch.Tensor
    pooled: torch.Tensor

    def select(self, places: torch.Tensor) -> "Batch":
        """The items at these places, in float32."""
        parts = (self.latents, self.condition, self.mask, self.text, self.pooled)
        return Batch(*(part[places].float() for part in parts))


def encode_scenes(encoders: Encoders, seed: int, first: int, count: int, width: int, height: int) -> Batch:
    """Scenes `first` to `first + count` of a stream; held in half precision, masks as bytes."""
    chunks = []
    for start in range(first, first + count, 64):
        indices = range(start, min(start + 64, first + count))
        rng = random.Random(f"bank:{seed}:{start}")
        scenes = [make_scene(seed, index, width, height) for index in indices]
        captions = [dress(scene.caption, rng) if rng.random() >= CAPTION_DROPOUT else "" for scene in scenes]
        pixels = np.stack([to_pixels(scene.image) for scene in scenes])
        masks = np.stack([np.asarray(make_mask(seed, index, width, height)) > 127 for index in indices])
        blanked = blank(pixels, masks[..., None].astype(np.float32))
        text, pooled = encoders.texts(captions)
        latents = encoders.latents(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        condition = encoders.latents(torch.from_numpy(blanked).permute(0, 3, 1, 2))
        parts = (latents.half(), condition.half(), torch.from_numpy(masks.astype(np.uint8)), text.half(), pooled.half())
        chunks.append(parts)
    return Batch(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


class Bank:
    """A few thousand encoded scenes of every size; a new generation replaces them now and then."""

    def __init__(self, encoders: Encoders, seed: int, generation: int, rank: int, pictures: int) -> None:
        self.sizes = list(SIZES)
        self.shares = list(SIZES.values())
        self.parts: dict[tuple[int, int], Batch] = {}
        for (width, height), share in SIZES.items():
            count = max(64, round(pictures * share))
            first = (generation * 64 + rank) * 10_000_000
            self.parts[width, height] = encode_scenes(encoders, seed, first, count, width, height)

    @classmethod
    def kept(cls, path: Path, encoders: Encoders, seed: int, generation: int, rank: int, pictures: int) -> "Bank":
        """The bank in this file; made and written first if the file is missing or holds another generation."""
        wanted = (seed, generation, rank, pictures, encoders.scale)
        if path.exists():
            state = torch.load(path, weights_only=False)
            if state["made_from"] == wanted:
                return state["bank"]
        bank = cls(encoders, seed, generation, rank, pictures)
        save_atomically({"bank": bank, "made_from": wanted}, path)
        return bank

    def batches(self, seed: int, tokens: int) -> Iterator[Batch]:
        """Endless random batches of one size each, of about `tokens` text and image tokens."""
        rng = random.Random(f"batches:{seed}")
        while True:
            width, height = rng.choices(self.sizes, self.shares)[0]
            part = self.parts[width, height]
            count = max(4, tokens // (16 + width * height // 256))
            places = torch.tensor([rng.randrange(len(part.latents)) for _ in range(count)])
            yield part.select(places)


def posterior_noise(shape: torch.Size, scale: float, generator: torch.Generator) -> torch.Tensor:
    """What sampling the VAE's posterior adds to normalised mean latents; diffusers samples its conditions."""
    return POSTERIOR_STD * scale * torch.randn(shape, generator=generator)
