"""What a LoRA loses when the frozen base is kept in a smaller precision, measured on the nano base.

For each precision and seed the same LoRA is trained on Fill Circles with the same draws, and its loss is taken on
held-out pairs at fixed noise levels: `python -m benchmarks.precision`. A precision is as good as bf16 if its mean
loss lies within BAND of bf16's. FLUX.1 Fill itself has not been measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.conditioning.item import Condition
from library.config.tables.model import ModelTable
from library.config.tables.network import NetworkTable
from library.flow.velocity import mix
from library.models.base import Base
from library.models.load import Residence, load_transformer
from library.models.predict import predict
from library.models.text import TextEmbeddings
from library.networks import build

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("bf16", "int8", "fp8", "nf4")
BAND = 0.03
"""Relative difference of held-out losses that counts as none: about twice the spread over seeds."""
LEVELS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Pairs:
    """Encoded items: target latents, condition, text."""

    latents: Tensor
    condition: Condition
    text: TextEmbeddings

    def take(self, index: Tensor) -> Pairs:
        """Some of the items."""
        condition = Condition(self.condition.latents[index], self.condition.mask[index])
        return Pairs(self.latents[index], condition, TextEmbeddings(self.text.t5[index], self.text.pooled[index]))


def encode(base: Base, split: str, count: int, size: int = 64) -> Pairs:
    """Fill Circles items in edit mode: outline in, filled circle out."""
    import numpy as np

    from tools.fill_circles import draw_circle, draw_outline, draw_target

    circles = [draw_circle(0, split, index, size, size) for index in range(count)]
    pixels = lambda image: torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 127.5 - 1
    vae, encoders = base.load_vae(), base.load_text_encoders()
    targets = vae.encode(torch.stack([pixels(draw_target(circle)) for circle in circles]))[0]
    sources = vae.encode(torch.stack([pixels(draw_outline(circle)) for circle in circles]))[0]
    text = encoders.encode([circle.prompt for circle in circles], base.defaults.t5xxl_max_token_length).embeddings
    return Pairs(targets, Condition(sources, torch.ones(count, 1, size, size)), text)


def loss(model, pairs: Pairs, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity."""
    predicted = predict(model, mix(pairs.latents, noise, t), t, pairs.text, pairs.condition, 1.0)
    return (predicted - (noise - pairs.latents)).square().mean()


def train(base: Base, precision: str, seed: int, train_pairs: Pairs, held_out: Pairs, steps: int) -> float:
    """Train a LoRA over this precision and return its held-out loss."""
    model = load_transformer(base.transformer_file, dtype=torch.bfloat16, residence=Residence(precision))
    parameters = build(NetworkTable(network_dim=16), model, seed=seed).attach()
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        index = torch.randint(len(train_pairs.latents), (8,), generator=generator)
        t, chosen = torch.rand(8, generator=generator), train_pairs.take(index)
        loss(model, chosen, t, torch.randn(chosen.latents.shape, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return held_out_loss(model, held_out)


@torch.no_grad()
def held_out_loss(model, pairs: Pairs) -> float:
    """The loss at fixed levels and noise."""
    noise = torch.randn(pairs.latents.shape, generator=torch.Generator().manual_seed(1))
    levels = [torch.full((len(noise),), level) for level in LEVELS]
    return statistics.mean(float(loss(model, pairs, t, noise)) for t in levels)


def run(steps: int, seeds: int, num_train: int = 256, num_held_out: int = 48) -> dict:
    """Every precision with every seed; losses, their means, and the difference from bf16."""
    base = Base.open(ModelTable(pretrained_model_name_or_path=str(ROOT / "nano")))
    train_pairs, held_out = encode(base, "train", num_train), encode(base, "unseen_pair", num_held_out)
    losses = {
        precision: [train(base, precision, seed, train_pairs, held_out, steps) for seed in range(seeds)]
        for precision in PRECISIONS
    }
    untrained = held_out_loss(load_transformer(base.transformer_file, dtype=torch.bfloat16), held_out)
    means = {precision: statistics.mean(values) for precision, values in losses.items()}
    difference = {precision: mean / means["bf16"] - 1 for precision, mean in means.items()}
    return {
        "base": "nano", "steps": steps, "seeds": seeds, "band": BAND, "untrained": untrained,
        "losses": losses, "means": means, "difference_from_bf16": difference,
    }  # fmt: skip


def table(record: dict) -> str:
    """The record as a Markdown table."""
    lines = ["| base precision | held-out loss | each seed | against bf16 |", "|---|---|---|---|"]
    for precision in PRECISIONS:
        each = ", ".join(f"{value:.4f}" for value in record["losses"][precision])
        lines.append(
            f"| {precision} | {record['means'][precision]:.4f} | {each} |"
            f" {100 * record['difference_from_bf16'][precision]:+.1f}% |"
        )
    return "\n".join([*lines, f"\nWithout training: {record['untrained']:.4f}."])


def main() -> None:
    """Train, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = run(given.steps, given.seeds)
    print(table(record))
    if given.output:
        given.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
