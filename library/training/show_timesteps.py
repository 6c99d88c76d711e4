"""`--show_timesteps`: the density of t that a configuration trains on, as text and as a picture."""

from pathlib import Path

import torch

from library.config.run import Run
from library.files import atomic_write
from library.flow.packing import PIXELS_PER_TOKEN
from library.flow.timesteps import timesteps
from library.flow.velocity import loss_weighting
from library.forecast import largest_bucket
from library.training.objective import timestep_choice

DRAWS, BINS, WIDTH = 200_000, 20, 50
FILE = "timesteps.png"


def histogram(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of draws in each of 20 equal parts of [0, 1], mean loss weight there)."""
    width, height, _ = largest_bucket(run.datasets)
    uniform = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    choice = timestep_choice(run.training)
    t = timesteps(uniform, choice, width * height // PIXELS_PER_TOKEN**2)
    index = (t * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(index, minlength=BINS).double()
    weights = torch.zeros(BINS, dtype=torch.float64).index_add_(
        0, index, loss_weighting(choice.weighting_scheme, t).double()
    )
    return counts / DRAWS, weights / counts.clamp(min=1)


def show(run: Run) -> int:
    """Print the histogram and write the picture. Returns the exit code."""
    shares, weights = histogram(run)
    top = shares.max().item()
    weighted = bool((weights[shares > 0] != 1).any())
    print(f"t of {DRAWS} draws ({run.training.timestep_sampling}, {run.training.weighting_scheme}); 1 is pure noise")
    for part in range(BINS):
        bar = "#" * round(WIDTH * shares[part].item() / top)
        extra = f"  loss x {weights[part]:.3g}" if weighted and shares[part] > 0 else ""
        print(f"{part / BINS:4.2f}-{(part + 1) / BINS:4.2f} {shares[part]:7.2%} {bar}{extra}")
    path = run.saving.output_dir / FILE
    atomic_write(path, lambda temporary: _plot(shares, temporary))
    print(f"picture: {path}")
    return 0


def _plot(shares: torch.Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar((torch.arange(BINS) + 0.5) / BINS, shares * BINS, width=1 / BINS, edgecolor="white")
    axes.set(xlabel="t (0: picture, 1: noise)", ylabel="density", xlim=(0, 1))
    figure.savefig(path, format="png")
