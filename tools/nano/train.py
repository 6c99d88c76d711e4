"""Trains the nano base's transformer on encoded scenes with flow matching.

    python -m tools.nano.train --work_dir output/nano --steps 12000 --replicas 2

Run the same command again to continue. The learning rate falls to zero over the last fifth of --steps. An average of
the weights over the last few hundred steps is kept beside them and is what gets exported.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from tools.nano.bank import Bank, Encoders, encode_scenes, load_encoders, posterior_noise
from tools.nano.flow import flow_loss, new_transformer
from tools.nano.replicas import Log, average_gradients, launch, save_atomically

VALIDATION_SEED = -3


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then linearly to zero over the last fifth."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (0.2 * steps))


@torch.no_grad()
def validate(model: FluxTransformer2DModel, encoders: Encoders) -> float:
    """Flow loss on 512 held-out 64-pixel scenes with fixed noise and times."""
    batch = encode_scenes(encoders, VALIDATION_SEED, 0, 512, 64, 64).select(torch.arange(512))
    return float(flow_loss(model, batch, torch.Generator().manual_seed(0)))


@torch.no_grad()
def update_average(average: FluxTransformer2DModel, model: FluxTransformer2DModel, step: int) -> None:
    """Exponential average of the weights, short at first."""
    keep = min(0.998, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


class Trainer:
    """All state of one replica; `run` continues where the last checkpoint ended."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.rank, self.options = rank, options
        self.path = options.work_dir / "transformer.pt"
        self.encoders = load_encoders(options.work_dir)
        self.model = new_transformer(options.seed)
        self.average = copy.deepcopy(self.model)
        self.parameters = list(self.model.parameters())
        decayed = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), foreach=True)
        self.step, spent = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, spent = state["step"], state["cpu_seconds"]
        self.log = Log(options.work_dir / "training_log.jsonl", rank, spent)

    def run(self) -> None:
        """Train generation after generation of scenes."""
        options = self.options
        while self.step < options.steps:
            generation = self.step // options.steps_per_bank
            path = options.work_dir / f"bank_{self.rank}.pt"
            bank = Bank.kept(path, self.encoders, options.seed, generation, self.rank, options.bank_size)
            last = min(options.steps, (generation + 1) * options.steps_per_bank)
            batches = bank.batches(self.step * 64 + self.rank, options.tokens)
            self.run_until(last, batches)

    def run_until(self, last: int, batches: object) -> None:
        """Train to step `last`, saving every minute or so."""
        generator = torch.Generator().manual_seed(self.step * 64 + self.rank)
        running, count, saved = 0.0, 0, time.monotonic()
        while self.step < last:
            batch = next(batches)
            noise = posterior_noise(batch.condition.shape, self.encoders.scale, generator)
            batch.condition += noise * torch.rand(len(noise), 1, 1, 1, generator=generator)
            loss = flow_loss(self.model, batch, generator)
            self.update(loss)
            running, count = running + loss.item(), count + 1
            if self.step % self.options.log_every == 0 or self.step == last:
                score = validate(self.average, self.encoders)
                self.log.write(
                    stage="transformer", step=self.step, loss=round(running / count, 4), validation=round(score, 4)
                )
                running, count = 0.0, 0
            if self.rank == 0 and (time.monotonic() - saved > 60 or self.step == last):
                self.save()
                saved = time.monotonic()

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options.steps, self.options.learning_rate)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_average(self.average, self.model, self.step)
        self.step += 1

    def save(self) -> None:
        """Everything that continuing needs."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "step": self.step}
        state |= {"optimizer": self.optimizer.state_dict(), "cpu_seconds": self.log.cpu_seconds()}
        save_atomically({**state, "shift": self.encoders.shift, "scale": self.encoders.scale}, self.path)


def train(rank: int, options: argparse.Namespace) -> None:
    """One replica."""
    Trainer(rank, options).run()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/nano"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=768, help="text and image tokens of a batch, of one replica")
    parser.add_argument("--bank_size", type=int, default=12000, help="encoded scenes in memory, of one replica")
    parser.add_argument("--steps_per_bank", type=int, default=20000)
    parser.add_argument("--log_every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    launch(train, options.replicas, options)


if __name__ == "__main__":
    main()
