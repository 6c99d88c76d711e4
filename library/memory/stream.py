"""Stream frozen blocks from host memory through a small ring of device buffers, ahead of their use.

Each streamed block lives in one flat host buffer (page-locked if the system allows it). Its bytes are copied to the
device, never back: the weights do not change. While one block computes, the next one (in the direction of travel,
forward or backward) is copied on a lane of its own into another slot of the ring. On a CPU the same code runs, and
computes bit for bit what resident weights compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.host import host_buffer
from library.memory.lane import Lane, Mark, lane_for
from library.memory.storage import Layout, Storage, Tensors

ALIGNMENT = 256


def flat_bytes(layouts: Sequence[Layout]) -> int:
    """Bytes of one flat buffer that holds these tensors, each aligned."""
    return sum(
        _aligned(math.prod(shape) * dtype.itemsize) for layout in layouts for shape, dtype in layout.values()
    )  # fmt: skip


def flat_views(buffer: Tensor, layouts: Sequence[Layout]) -> list[Tensors]:
    """The tensors of these layouts as views of a flat byte buffer."""
    found, offset = [], 0
    for layout in layouts:
        tensors = {}
        for name, (shape, dtype) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            tensors[name] = buffer[offset : offset + size].view(dtype).view(shape)
            offset += _aligned(size)
        found.append(tensors)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def spread(count: int, total: int) -> list[int]:
    """`count` block indices spread evenly over `total`, so that resident blocks hide the copies between them."""
    count = min(count, total)
    return [int((k + 0.5) * total / count) for k in range(count)]


class HostBlock:
    """One streamed block: its storages, and the flat host buffer that is their home."""

    def __init__(self, storages: Sequence[Storage], buffer: Tensor):
        self.storages = list(storages)
        self.buffer = buffer
        self.layouts = [_layout(storage) for storage in storages]

    @classmethod
    def of(cls, storages: Sequence[Storage], pin: bool = True) -> HostBlock:
        """Move storages into a flat buffer of their own."""
        layouts = [_layout(storage) for storage in storages]
        buffer = host_buffer(flat_bytes(layouts), pin)
        for storage, views in zip(storages, flat_views(buffer, layouts)):
            for name, view in views.items():
                view.copy_(storage.home[name])
            storage.rehome(views)
        return cls(storages, buffer)


def _layout(storage: Storage) -> Layout:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in storage.home.items()}


@dataclass
class Slot:
    """One device buffer of the ring, what it holds, and when that has arrived (`staging`: when that is known)."""

    buffer: Tensor
    held: int | None = None
    arrived: Mark = None
    staging: Future[Mark] | None = None
    last_use: int = 0


class Streamer:
    """Brings blocks to the device before they are needed.

    blocks: the streamed blocks by their index in the model's list of blocks. bytes_copied counts host-to-device bytes.
    """

    def __init__(self, blocks: dict[int, HostBlock], device: torch.device, ring: int = 2, lane: Lane | None = None):
        self.blocks = blocks
        self.order = sorted(blocks)
        self.device = device
        self.bytes_copied = 0
        size = max(block.buffer.numel() for block in blocks.values())
        self.slots = [
            Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(ring, len(blocks)))
        ]  # fmt: skip
        self.lane = lane or lane_for(device)
        self._clock = 0
        self._views: dict[tuple[int, int], list[Tensors]] = {}
        pageable = device.type == "cuda" and torch.cuda.is_available() and not _all_pinned(blocks)
        self._staging = _Staging(self.lane, size) if pageable else None
        for index, block in blocks.items():
            for storage in block.storages:
                storage.changed = lambda index=index: self._forget(index)

    def begin(self) -> None:
        """A forward pass is about to start: bring its first block."""
        self._prefetch([self.order[0]], keep=set())

    def need(self, index: int, backward: bool) -> None:
        """Block `index` computes next: have its weights on the device and bound, and bring those that follow."""
        if index not in self.blocks:
            return
        slot = self._slot_of(index) or self._load(index, keep={index})
        self._wait(slot)
        self._clock += 1
        slot.last_use = self._clock
        self._bind(index, slot)
        ahead = self._ahead(index, backward)
        self._prefetch(ahead, keep={index, *ahead})

    def release(self) -> None:
        """Compute from host memory again (for merging, saving or quantising while nothing runs)."""
        for block in self.blocks.values():
            for storage in block.storages:
                storage.bind(storage.home)

    def _ahead(self, index: int, backward: bool) -> list[int]:
        """The blocks that follow in the direction of travel, as many as the ring can hold beside this one.

        A forward pass without gradients is followed by another one, so its end wraps around.
        """
        position = self.order.index(index)
        span = len(self.slots) - 1
        if backward:
            return self.order[max(0, position - span) : position][::-1]
        following = self.order[position + 1 : position + 1 + span]
        if not torch.is_grad_enabled():
            following += self.order[: span - len(following)]
        return following

    def _prefetch(self, indices: list[int], keep: set[int]) -> None:
        for index in indices:
            if self._slot_of(index) is None:
                self._load(index, keep)

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.held == index), None)

    def _load(self, index: int, keep: set[int]) -> Slot:
        """Start copying a block into the slot that was used longest ago (and is not kept)."""
        free = [slot for slot in self.slots if slot.held not in keep or slot.held is None]
        slot = min(free or self.slots, key=lambda slot: slot.last_use)
        self._wait(slot)
        source = self.blocks[index].buffer
        target = slot.buffer[: source.numel()]
        self.bytes_copied += source.numel()
        slot.held = index
        # All work given so far, which includes the last use of this slot, has to be done before it is overwritten.
        done = self.lane.now()
        if self._staging is None:
            slot.arrived = self.lane.copy(target, source, done)
        else:
            slot.staging = self._staging.copy(target, source, done)
        return slot

    def _wait(self, slot: Slot) -> None:
        """Let the computation wait for the slot's copy."""
        if slot.staging is not None:
            slot.arrived, slot.staging = slot.staging.result(), None
        if slot.arrived is not None:
            self.lane.wait(slot.arrived)

    def _bind(self, index: int, slot: Slot) -> None:
        key = (index, id(slot))
        if key not in self._views:
            self._views[key] = flat_views(slot.buffer, self.blocks[index].layouts)
        for storage, views in zip(self.blocks[index].storages, self._views[key]):
            storage.bind(views)

    def _forget(self, index: int) -> None:
        """A weight of this block was replaced at home."""
        slot = self._slot_of(index)
        if slot is not None:
            self._wait(slot)
            slot.held = None


class _Staging:
    """Copies from pageable memory: a worker fills two page-locked buffers in turn, so the caller never blocks."""

    def __init__(self, lane: Lane, size: int):
        self._lane = lane
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="influx-staging")
        self._buffers = [host_buffer(size, pin=True) for _ in range(2)]
        self._emptied: list[Mark] = [None, None]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Future[Mark]:
        """Stage and copy in the worker; the future holds when the copy has arrived."""
        return self._worker.submit(self._run, target, source, after)

    def _run(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        turn, self._turn = self._turn, 1 - self._turn
        if self._emptied[turn] is not None:
            self._lane.finish(self._emptied[turn])
        staged = self._buffers[turn][: source.numel()]
        staged.copy_(source)
        self._emptied[turn] = self._lane.copy(target, staged, after)
        return self._emptied[turn]


def _all_pinned(blocks: dict[int, HostBlock]) -> bool:
    return all(block.buffer.is_pinned() for block in blocks.values())
