"""One tiny FLUX.1 Fill on both sides: ours and diffusers', with the same weights; and inputs for both."""

from pathlib import Path

import torch

from library.config.tables.network import NetworkTable
from library.models.checkpoint_file import TransformerFile
from library.models.flux import FluxTransformer
from library.models.load import load_transformer
from library.networks import build
from library.networks.network import Network
from tests.tiny import tiny_transformer

TEXT, TOKENS = 5, 12


def both(folder: Path, dtype: torch.dtype = torch.float32, **shape):
    """(ours, diffusers') transformer with equal weights."""
    theirs = tiny_transformer(**shape)
    theirs.save_pretrained(folder)
    return load_transformer(TransformerFile.open(folder), dtype=dtype), theirs.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2, hidden_text: int = 32, seed: int = 3) -> dict:
    """One forward's arguments, in our names."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(TOKENS, 3)
    ids[:, 1], ids[:, 2] = torch.arange(TOKENS) // 4, torch.arange(TOKENS) % 4
    return {
        "tokens": torch.randn(batch, TOKENS, 384, generator=draw, dtype=dtype),
        "text": torch.randn(batch, TEXT, hidden_text, generator=draw, dtype=dtype),
        "pooled": torch.randn(batch, hidden_text, generator=draw, dtype=dtype),
        "timestep": torch.rand(batch, generator=draw, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "image_ids": ids,
    }


def diffusers_output(model, given: dict) -> torch.Tensor:
    """The same forward in diffusers' transformer."""
    return model(
        hidden_states=given["tokens"], encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
        timestep=given["timestep"], guidance=given["guidance"], img_ids=given["image_ids"],
        txt_ids=torch.zeros(TEXT, 3), return_dict=False,
    )[0]  # fmt: skip


def network_on(model: FluxTransformer, *, randomised: bool = True, seed: int = 0, **table) -> Network:
    """A network on ``model``, attached; with values everywhere, as after training."""
    network = build(NetworkTable(**table), model, seed)
    if randomised:
        draw = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for parameter in network.trained():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    network.attach()
    return network


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-30))
