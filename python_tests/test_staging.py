"""The order in which clients reach a GPU, on a model of one that is as late as it may be.

The model keeps what CUDA and torch's caching allocator promise and nothing more: a stream runs its work
in order, whenever it likes; an event is waited for; a block goes back to the pool of the stream that it
was allocated on as soon as nobody refers to it, or once the streams noted by record_stream have run what
they had been given until then.
"""

from __future__ import annotations

import random
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from equations import client

from fastagg import methods
from fastagg.accumulators import staging
from fastagg.accumulators.staging import Staging
from fastagg.handouts.choices import Settings
from fastagg.planning.roster import Roster
from fastagg.rounds.memory_plan import MemoryPlan

CLIENTS = 40


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.given: list[Callable[[], bool]] = []  # each returns whether it could run
        self.done = 0
        gpu.streams.append(self)

    def launch(self, work: Callable[[], object]) -> None:
        self.given.append(lambda: (work(), True)[1])

    def record_event(self) -> Event:
        return Event(self)

    def wait_stream(self, other: Stream) -> None:
        until = Event(other)
        self.given.append(until.passed)

    def step(self) -> None:
        if self.done < len(self.given) and self.given[self.done]():
            self.done += 1


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.given)

    def passed(self) -> bool:
        return self.stream.done >= self.place

    def synchronize(self) -> None:
        while not self.passed():
            self.stream.gpu.step()


class Block:
    """Memory of the device; `value` is what was last written there."""

    def __init__(self) -> None:
        self.value: list[int] | None = None
        self.used_by: list[Stream] = []


class OnDevice:
    """A tensor on the device, as long as Python refers to it."""

    def __init__(self, block: Block, pool: list[tuple[Block, list[Event]]]) -> None:
        self.block = block
        weakref.finalize(self, lambda: pool.append((block, [Event(each) for each in block.used_by])))

    def record_stream(self, stream: Stream) -> None:
        self.block.used_by.append(stream)


class Gpu:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.streams: list[Stream] = []
        self.compute = self.current = Stream(self)
        self.pools: dict[Stream, list[tuple[Block, list[Event]]]] = {}
        self.blocks = 0

    def step(self) -> None:
        self.rng.choice(self.streams).step()

    def allocate(self) -> OnDevice:
        pool = self.pools.setdefault(self.current, [])
        for place, (block, events) in enumerate(pool):
            if all(event.passed() for event in events):
                del pool[place]
                block.used_by = []
                return OnDevice(block, pool)
        self.blocks += 1
        return OnDevice(Block(), pool)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def torch(self) -> Any:
        """What staging sees of torch."""
        cuda = types.SimpleNamespace(
            Stream=lambda device: Stream(self),
            stream=self.on,
            current_stream=lambda device: self.current,
        )

        def empty(count: int, dtype: torch.dtype, pin_memory: bool = False) -> Pinned:
            return Pinned(self, count)

        return types.SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=empty)


class Pinned:
    def __init__(self, gpu: Gpu, count: int) -> None:
        self.gpu, self.data = gpu, [0] * count

    def numel(self) -> int:
        return len(self.data)

    def __getitem__(self, which: slice) -> PinnedView:
        return PinnedView(self, which.stop)


class PinnedView:
    def __init__(self, whole: Pinned, count: int) -> None:
        self.whole, self.count = whole, count

    def copy_(self, flat: torch.Tensor) -> None:
        self.whole.data[: self.count] = flat.tolist()

    def to(self, device: torch.device, non_blocking: bool) -> OnDevice:
        assert non_blocking
        gpu = self.whole.gpu
        target = gpu.allocate()
        block, whole, count = target.block, self.whole, self.count

        def copy() -> None:
            block.value = whole.data[:count]

        gpu.current.launch(copy)
        return target


@pytest.mark.parametrize("lateness", [0, 1, 5, 50])
def test_each_fold_reads_its_own_client_and_two_are_held(
    seed: int, lateness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    gpu = Gpu(rng)
    monkeypatch.setattr(staging, "torch", gpu.torch())
    clients = [torch.full((rng.randint(0, 6),), k, dtype=torch.uint8) for k in range(CLIENTS)]
    stage = Staging(torch.device("cuda"))
    folded: list[list[int] | None] = []

    def fold(brought: Any) -> None:
        block = brought.block
        gpu.compute.launch(lambda: folded.append(block.value))

    for flat in clients:
        fold(stage.bring(flat))
        for _ in range(rng.randint(0, lateness)):
            gpu.step()
    gpu.compute.record_event().synchronize()
    assert folded == [flat.tolist() for flat in clients]
    assert gpu.blocks == 2


def test_clients_may_be_folded_on_several_streams(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one stream has passed says nothing of a copy that another waits for."""
    rng = random.Random(seed)
    gpu = Gpu(rng)
    monkeypatch.setattr(staging, "torch", gpu.torch())
    stage = Staging(torch.device("cuda"))
    computing = [gpu.compute, Stream(gpu), Stream(gpu)]
    folded: dict[int, list[int] | None] = {}
    for k in range(CLIENTS):
        gpu.current = rng.choice(computing)
        brought: Any = stage.bring(torch.tensor([k], dtype=torch.uint8))
        gpu.current.launch(lambda k=k, block=brought.block: folded.update({k: block.value}))
    for stream in gpu.streams:
        stream.record_event().synchronize()
    assert folded == {k: [k] for k in range(CLIENTS)}


def test_the_copy_of_a_client_does_not_wait_for_the_fold_before(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(random.Random(seed))
    monkeypatch.setattr(staging, "torch", gpu.torch())
    stage = Staging(torch.device("cuda"))
    for value in (1, 2):
        held = stage.bring(torch.tensor([value], dtype=torch.uint8))
        gpu.compute.launch(lambda: None)
    copies = gpu.streams[1]
    while copies.done < len(copies.given):
        copies.step()
    assert gpu.compute.done == 0 and held.block.value == [2]  # type: ignore[attr-defined]


def test_nothing_is_copied_where_it_lies_already() -> None:
    flat = torch.zeros(8, dtype=torch.uint8)
    assert Staging(torch.device("cpu")).bring(flat) is flat
    assert Staging.bytes_for(torch.device("cpu"), 100) == 0
    assert Staging.bytes_for(torch.device("cuda"), 100) == 200


@pytest.mark.parametrize(("method", "kind"), [("flexlora", "dense"), ("zeropad", "means")])
def test_sums_on_a_gpu_need_room_for_two_clients(method: str, kind: str) -> None:
    clients = [client(f"c{k}", rank) for k, rank in enumerate((8, 64, 4))]
    largest = max(each.adapter.nbytes for each in clients)
    needs = {}
    for device in ("cpu", "cuda"):
        # No work but folding: a budget of 16 bytes folds a byte, so one module, at a time.
        settings = Settings("qr", device=torch.device(device))
        plan = MemoryPlan(methods.get(method), settings, 16, kind if kind == "dense" else "auto")
        roster = Roster().with_headers(
            (each.name, each.adapter.layout, each.adapter.config) for each in clients
        )
        needs[device] = plan._needs(roster, ())
    work = {device: getattr(each, f"{kind}_work") for device, each in needs.items()}
    assert getattr(needs["cuda"], kind) == getattr(needs["cpu"], kind)
    assert 2 * largest < work["cuda"] <= work["cpu"] + 2 * largest
    assert needs["cuda"].stack_work == needs["cpu"].stack_work
