"""Data-parallel training in single-threaded processes: on a busy CPU two of these beat one process with two threads."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(worker: Callable[..., None], replicas: int, *args: object) -> None:
    """Run worker(rank, *args) in `replicas` processes that can average gradients; in this process if there is one."""
    if replicas == 1:
        torch.set_num_threads(1)
        worker(0, *args)
        return
    store = Path(tempfile.mkdtemp()) / "store"
    mp.start_processes(_enter, args=(worker, replicas, str(store), args), nprocs=replicas, start_method="spawn")


def _enter(rank: int, worker: Callable[..., None], replicas: int, store: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=replicas)
    worker(rank, *args)
    dist.destroy_process_group()


def world_size() -> int:
    """How many replicas train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the replicas, in one message."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def save_atomically(state: object, path: Path) -> None:
    """torch.save that never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    torch.save(state, part)
    os.replace(part, path)


class Log:
    """Appends JSON lines with the CPU seconds of this process; silent on every replica but the first."""

    def __init__(self, path: Path, rank: int, spent: float = 0.0) -> None:
        self.path, self.rank, self.spent = path, rank, spent
        path.parent.mkdir(parents=True, exist_ok=True)

    def cpu_seconds(self) -> float:
        """CPU seconds of this stage, earlier runs included, all replicas together (assumed equally busy)."""
        return self.spent + time.process_time() * world_size()

    def write(self, **values: object) -> None:
        """Add one line."""
        if self.rank:
            return
        line = json.dumps({**values, "cpu_seconds": round(self.cpu_seconds())})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
