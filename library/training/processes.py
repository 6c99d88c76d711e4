"""The processes of one run. Started by `accelerate launch` or `torchrun`, or alone.

Only the trained parameters have gradients, some tens of megabytes, so one sum over all of them per optimizer step is
all the communication a run needs: no wrapper around the model, and the same code for one process and for many.
"""

import datetime
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from library.errors import ConfigError, DiskError, Stopped, UserError


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def world_from_environment(local_rank: int = -1) -> World:
    """What the launcher says; `local_rank` fills LOCAL_RANK for launchers that do not set it."""
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        world = World(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))
    except ValueError as error:
        raise ConfigError(f"the launcher set a RANK, WORLD_SIZE or LOCAL_RANK that is no number: {error}") from error
    if world.size > 1 and "RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE is set but RANK is not: start with `accelerate launch` or `torchrun`")
    return world


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def join(world: World, device: torch.device) -> None:
    """Meet the other processes. Does nothing for a run of one."""
    if world.size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the main process paints previews: longer than the usual ten minutes on slow machines
    patience = datetime.timedelta(hours=3)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=patience)


def leave(world: World) -> None:
    """Part from the other processes."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its sum over all processes. A parameter without a gradient counts as zeros."""
    if world.size == 1:
        return
    held = list(parameters)
    for parameter in held:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.detach().float().reshape(-1) for parameter in held])
    dist.all_reduce(flat)
    start = 0
    for parameter in held:
        count = parameter.numel()
        parameter.grad.copy_(flat[start : start + count].view_as(parameter))
        start += count


def sum_values(values: list[float], world: World, device: torch.device) -> list[float]:
    """The sum of each number over all processes."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device="cpu" if device.type == "cpu" else device)
    dist.all_reduce(total)
    return total.tolist()


def from_main(value: object, world: World) -> object:
    """The main process's value, in every process."""
    if world.size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def by_main(make: Callable[[], object], world: World) -> object:
    """What the main process makes, in every process; if it refuses, all end, and only it says why."""
    value, refused = None, None
    if world.is_main:
        try:
            value = make()
        except (UserError, OSError) as error:
            refused = error
    code = None if refused is None else getattr(refused, "exit_code", DiskError.exit_code)
    value, code = from_main((value, code), world)
    if refused is not None:
        raise refused
    if code is not None:
        raise Stopped("the main process could not begin; its message says why", code)
    return value


def wait_for_all(world: World) -> None:
    """Returns when every process has come here."""
    if world.size > 1:
        dist.barrier()


def same_parameters(parameters: dict[str, nn.Parameter], world: World) -> None:
    """Copy the main process's trained parameters to all, so that runs without a fixed seed start alike."""
    if world.size > 1:
        for parameter in parameters.values():
            dist.broadcast(parameter.data, src=0)


def sharding_wanted() -> bool:
    """Whether the launcher asked for the frozen base to be split over the processes (FSDP, or DeepSpeed's stage 3)."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    return fsdp or (deepspeed and stage == "3")
