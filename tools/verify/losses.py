"""The velocity error of a base at several noise levels, in the hidden and in the visible part of one picture.

Guidance is 1, as in training: FLUX.1 Fill is distilled to answer like a guided model at higher values, which is not
the plain velocity and whose error is larger.

The band follows from Gaussian latents. For x of mean square s^2 and noise n the best linear guess of v = n - x from
z = (1 - t) x + t n errs by s^2 / ((1 - t)^2 s^2 + t^2) (`gaussian_loss`); it knows how bright latents are and nothing
else. From that:

* In the hidden part a trained model knows what pictures look like, its caption and the surroundings: its error is
  at most HIDDEN_HIGHEST of that guess. Below HIDDEN_LOWEST the hidden pixels would have to be known.
* In the visible part the condition channels show the picture, so that only a share of s^2 is left to guess. A model
  that reads them is at most at the guess for VISIBLE_LEFT * s^2: they must explain three quarters. (The VAE encodes the
  picture with its hole, which changes visible latents too: by 14 and 35% of their variance in two pictures on the nano
  base at 64 px. A trained model knows that, and is at 0.02 to 0.05 of the Gaussian guess there.)

Tests hold that random weights are outside, and so is the nano base with its condition channels zeroed, exchanged or
packed otherwise (in the visible part), or without the mask's channels (in the hidden part).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.conditioning.item import Condition
from library.flow.velocity import mix
from library.models.flux import FluxTransformer
from library.models.predict import predict
from library.models.text import TextEmbeddings

LEVELS = (0.25, 0.5, 0.75, 0.9)
GUIDANCE = 1.0
HIDDEN_LOWEST, HIDDEN_HIGHEST = 0.002, 1.0
VISIBLE_LEFT = 0.25
LATENT_SIDE = 8


@dataclass(frozen=True)
class LevelLoss:
    """Mean squared velocity errors at one noise level, and the bounds they must keep."""

    level: float
    hidden: float
    hidden_bounds: tuple[float, float]
    visible: float
    visible_bound: float

    @property
    def passed(self) -> bool:
        low, high = self.hidden_bounds
        return low <= self.hidden <= high and self.visible <= self.visible_bound

    def line(self) -> str:
        """A row of the table under `HEADING`."""
        low, high = self.hidden_bounds
        hidden, visible = (
            f"{self.hidden:.4f} ({low:.4f} to {high:.4f})",
            f"{self.visible:.4f} (at most {self.visible_bound:.4f})",
        )
        return f"{self.level:>5.2f}  {hidden:<28}  {visible:<26}  {'ok' if self.passed else 'OUTSIDE'}"


HEADING = f"{'sigma':>5}  {'loss where masked':<28}  {'loss where visible':<26}"


def gaussian_loss(variance: float, level: float) -> float:
    """The least mean squared velocity error for latents that are Gaussian of this variance, at noise level t.

    With z = (1 - t) x + t n and v = n - x: Var(v) - Cov(v, z)^2 / Var(z) = s^2 / ((1 - t)^2 s^2 + t^2).
    """
    return variance / ((1 - level) ** 2 * variance + level**2)


@torch.no_grad()
def measure(
    transformer: FluxTransformer, latents: Tensor, text: TextEmbeddings, condition: Condition
) -> list[LevelLoss]:
    """The errors for latents (1, 16, h, w) in model space, with one draw of noise."""
    device = transformer.device
    latents, condition = latents.to(device), condition.to(device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    is_hidden = condition.mask[..., ::LATENT_SIDE, ::LATENT_SIDE].bool().expand_as(latents)
    power = {part: float(latents[part_of].square().mean()) for part, part_of in _parts(is_hidden).items()}
    found = []
    for level in LEVELS:
        t = torch.full((1,), level, device=device)
        predicted = predict(transformer, mix(latents, noise, t), t, text, condition, GUIDANCE)
        error = (predicted - (noise - latents)).square()
        loss = {part: float(error[part_of].mean()) for part, part_of in _parts(is_hidden).items()}
        guess = gaussian_loss(power["hidden"], level)
        bounds = (HIDDEN_LOWEST * guess, HIDDEN_HIGHEST * guess)
        visible_bound = gaussian_loss(VISIBLE_LEFT * power["visible"], level)
        found.append(LevelLoss(level, loss["hidden"], bounds, loss["visible"], visible_bound))
    return found


def _parts(is_hidden: Tensor) -> dict[str, Tensor]:
    return {"hidden": is_hidden, "visible": ~is_hidden}
