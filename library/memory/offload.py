"""Where the inputs of checkpointed blocks wait for the backward pass: on the device, or in host memory.

In host memory they leave on a lane of their own while the next block computes, and come back one block ahead of their
use.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from library.memory.host import host_tensor
from library.memory.lane import Lane, Mark, lane_for

Tensors = tuple[Tensor, ...]
LEAVING = 2
"""Blocks whose inputs may be on their way to the host at once; the computation waits for the earlier ones."""
LARGE = 1 << 20
"""Bytes from which a tensor is worth a trip; modulation vectors and rotation tables stay on the device."""


class Kept:
    """The inputs of one block, kept for its backward pass."""

    def restore(self, ctx) -> Tensors:
        """The inputs again, on their device. `ctx` is the autograd context they were kept with."""
        raise NotImplementedError


class Keeper:
    """Keeps block inputs between the forward and the backward pass."""

    def begin(self) -> None:
        """A forward pass is about to start."""

    def keep(self, ctx, tensors: Tensors) -> Kept:
        """Keep `tensors`, which the block is about to read."""
        raise NotImplementedError


class _Saved(Kept):
    def restore(self, ctx) -> Tensors:
        return ctx.saved_tensors


class OnDevice(Keeper):
    """Keeps them where they are."""

    def keep(self, ctx, tensors: Tensors) -> Kept:
        ctx.save_for_backward(*tensors)
        return _Saved()


class InHostMemory(Keeper):
    """Keeps large inputs in (page-locked, reused) host buffers."""

    def __init__(self, device: torch.device, pin: bool = True, large: int = LARGE, lane: Lane | None = None):
        self.device = device
        self.pin = pin and device.type == "cuda" and torch.cuda.is_available()
        self.large = large
        self.bytes_kept = 0
        self.lane = lane or lane_for(device)
        self.free: dict[tuple, list[Tensor]] = defaultdict(list)
        self.waiting: list[_InHost] = []
        self.leaving: list[tuple[list[Tensor], Mark]] = []

    def begin(self) -> None:
        self.waiting.clear()
        self._let_go(0)

    def keep(self, ctx, tensors: Tensors) -> Kept:
        large = [tensor.numel() * tensor.element_size() >= self.large for tensor in tensors]
        ctx.save_for_backward(*(tensor for tensor, away in zip(tensors, large) if not away))
        kept = _InHost(self, large, self._leave([tensor.detach() for tensor, away in zip(tensors, large) if away]))
        self.waiting.append(kept)
        return kept

    def _leave(self, tensors: list[Tensor]) -> list[Tensor]:
        """Start copying tensors to the host."""
        self._let_go(LEAVING - 1)
        hosts, now, gone = [self._host_tensor(tensor) for tensor in tensors], self.lane.now(), None
        for host, tensor in zip(hosts, tensors):
            self.bytes_kept += tensor.numel() * tensor.element_size()
            gone = self.lane.copy(host, tensor, now)
        self.leaving.append((tensors, gone))
        return hosts

    def _let_go(self, still: int) -> None:
        """Free the device's copies of all but the last `still` blocks' inputs.

        The computation waits for their copies, which are long done, so that their memory can be given to it at once:
        the host thread runs ahead of the device by a whole forward pass, and could not know.
        """
        while len(self.leaving) > still:
            tensors, gone = self.leaving.pop(0)
            if tensors:
                self.lane.wait(gone)

    def _host_tensor(self, tensor: Tensor) -> Tensor:
        key = (tuple(tensor.shape), tensor.dtype)
        if self.free[key]:
            return self.free[key].pop()
        host = host_tensor(tensor.shape, tensor.dtype, self.pin)
        self.pin = self.pin and host.is_pinned()
        return host

    def before(self, kept: _InHost) -> _InHost | None:
        """The inputs that the backward pass will ask for after these, which are then forgotten here."""
        if kept not in self.waiting:
            return None
        position = self.waiting.index(kept)
        del self.waiting[position:]
        return self.waiting[-1] if self.waiting else None


class _InHost(Kept):
    def __init__(self, keeper: InHostMemory, large: list[bool], host: list[Tensor]):
        self.keeper = keeper
        self.large = large
        self.host = host
        self.returned: list[Tensor] | None = None
        self.arrived: Mark = None

    def restore(self, ctx) -> Tensors:
        self.keeper._let_go(0)
        self.fetch()
        following = self.keeper.before(self)
        if following is not None:
            following.fetch()
        if self.arrived is not None:
            self.keeper.lane.wait(self.arrived)
        small, back = iter(ctx.saved_tensors), iter(self.returned)
        tensors = tuple(next(back if away else small) for away in self.large)
        for host in self.host:
            self.keeper.free[(tuple(host.shape), host.dtype)].append(host)
        self.host, self.returned = [], None
        return tensors

    def fetch(self) -> None:
        """Start copying the tensors back, unless that has happened."""
        if self.returned is not None:
            return
        lane = self.keeper.lane
        self.returned = [torch.empty_like(host, device=self.keeper.device) for host in self.host]
        now = lane.now()
        for tensor, host in zip(self.returned, self.host):
            self.arrived = lane.copy(tensor, host, now)
