"""What would run beside each other on a CUDA device never touches the same memory unordered.

No GPU is needed: torch's CUDA sanitizer keeps the account of which kernel may run beside which, and is told here of
every operator of a real training step as if the CPU's tensors were the device's. Copies are put off until somebody
waits for them, so that a missing wait also shows in the numbers.
"""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from library.memory.lane import Lane
from library.memory.offload import InHostMemory
from library.memory.stream import Streamer
from tests.models.test_residence import BLOCKS, build, train
from tests.tiny import tiny_transformer

COMPUTE = 0
ALLOCATIONS = ("aten::empty", "aten::new_empty")


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


class Watch(TorchDispatchMode):
    """Tells the sanitizer of every operator: what it reads and writes, and that it runs on the computing stream."""

    def __init__(self) -> None:
        super().__init__()
        self.account = EventHandler()
        self.account._handle_stream_creation(COMPUTE)
        self.races: list[str] = []
        self.kernels = 0

    def launch(self, stream: int, read: set[int], written: set[int], name: str) -> None:
        self.kernels += 1
        known = {pointer: [name] for pointer in read | written}
        found = self.account._handle_kernel_launch(stream, read - written, written, written, name, known)
        self.races += [str(error) for error in found]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        before = {storage_of(tensor) for tensor in given}
        result = func(*args, **(kwargs or {}))
        made = {storage_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        changed = {
            storage_of(value)
            for value, argument in zip(args, func._schema.arguments)
            if isinstance(value, torch.Tensor) and argument.alias_info is not None and argument.alias_info.is_write
        }
        untouched = func._schema.name.startswith(ALLOCATIONS)
        if not untouched and ((made - before) or changed):  # nor does a view touch memory
            self.launch(COMPUTE, before, (made - before) | changed, func._schema.name)
        return result


@dataclass
class Copy:
    """A copy that has been asked for. It holds no tensor of the caller's, whose memory may be given away."""

    target: torch.Tensor
    value: torch.Tensor


@dataclass
class SimulatedLane(Lane):
    """A lane whose copies happen when somebody waits for them, and not a moment earlier."""

    watch: Watch
    number: int
    pending: list[tuple[int, Copy]] = field(default_factory=list)
    events: itertools.count = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.watch.account._handle_stream_creation(self.number)

    def event(self, stream: int) -> int:
        event = self.number * 1_000_000 + next(self.events)
        self.watch.account._handle_event_creation(event)
        self.watch.account._handle_event_record(event, stream)
        return event

    def now(self) -> int:
        return self.event(COMPUTE)

    def copy(self, target, source, after) -> int:
        self.watch.account._handle_event_wait(after, self.number)
        self.watch.launch(self.number, {storage_of(source)}, {storage_of(target)}, "copy ahead")
        arrived = self.event(self.number)
        with _disable_current_modes():
            self.pending.append((arrived, Copy(target, source.clone())))
        return arrived

    def wait(self, mark) -> None:
        self.watch.account._handle_event_wait(mark, COMPUTE)
        self.settle(mark)

    def settle(self, mark) -> None:
        """Do what was put off, in order, up to this mark."""
        with _disable_current_modes(), torch.no_grad():
            while self.pending and self.pending[0][0] <= mark:
                _, copy = self.pending.pop(0)
                copy.target.copy_(copy.value)


class NeverWaits(SimulatedLane):
    """A lane whose arrivals nobody waits for."""

    def wait(self, mark) -> None:
        self.settle(mark)


class StartsAtOnce(SimulatedLane):
    """A lane that does not wait for the last use of what it overwrites."""

    def copy(self, target, source, after) -> int:
        return super().copy(target, source, self.event(self.number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    tiny_transformer(double=2, single=4).save_pretrained(path)
    return path


def watched(folder, kind=SimulatedLane, offload=True, checkpointing=True, previews=True, ring=2, swapped=BLOCKS):
    """(results, races, kernels) of training with everything streamed over simulated lanes."""
    model = build(folder, precision="int8", blocks_to_swap=swapped, ring=ring)
    model.runner.checkpointing = checkpointing
    with Watch() as watch:
        streamer = model.runner.streamer
        model.runner.streamer = Streamer(streamer.blocks, streamer.device, ring, kind(watch, 1))
        if offload:
            model.runner.keeper = InHostMemory(torch.device("cpu"), large=1, lane=kind(watch, 2))
        results = train(model, preview=previews)
    return results, watch.races, watch.kernels


@pytest.mark.parametrize("swapped", [3, BLOCKS])
@pytest.mark.parametrize("ring", [2, 3])
@pytest.mark.parametrize(("offload", "checkpointing"), [(True, True), (False, True), (False, False)])
def test_streaming_and_offload_race_with_nothing(folder, swapped, ring, offload, checkpointing) -> None:
    plain = build(folder, precision="int8")
    plain.runner.checkpointing = checkpointing
    expected = train(plain)
    results, races, kernels = watched(folder, SimulatedLane, offload, checkpointing, True, ring, swapped)
    assert not races and kernels > 1000
    assert len(results) == len(expected) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected))


@pytest.mark.parametrize("kind", [NeverWaits, StartsAtOnce])
def test_the_watch_sees_a_missing_order(folder, kind) -> None:
    assert watched(folder, kind, offload=False)[1]


def test_a_copy_that_nobody_waits_for_shows_in_the_numbers(folder) -> None:
    class Late(SimulatedLane):
        def wait(self, mark) -> None:
            """Forget to wait."""

    good, bad = watched(folder, SimulatedLane)[0], watched(folder, Late)[0]
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(good, bad))


def test_the_plain_lane_copies_at_once() -> None:
    lane, target = Lane(), torch.zeros(3)
    mark = lane.copy(target, torch.ones(3), lane.now())
    assert torch.equal(target, torch.ones(3))
    lane.wait(mark)
    lane.finish(mark)
