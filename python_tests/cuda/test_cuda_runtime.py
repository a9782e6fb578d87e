"""What only a GPU can show: streams, graphs, tables on the device, several devices, memory, size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_device import moved, needs_gpu
from op_calls import called, results, tensors_of
from op_samples import NAMES, Sample, samples
from stacks import bytes_of, normal, random_bucket, random_stack
from torch import Tensor

from fastagg import ops

pytestmark = [
    needs_gpu,
    # torch's inductor meets its own torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

LONG = 1_000_000_000
"""Cycles that a sleeping kernel takes: half a second."""

WITH_TABLES = {
    "scan": (1,),
    "stack": (1, 2),
    "stack_": (3, 4),
    "update_gram": (3,),
    "randomized_svd": (7,),
    "randomized_svd_dense": (5,),
    "redistribute": (3, 4),
    "redistribute_": (4, 5),
}
"""Which of an op's arguments may lie on the CPU."""


def op_of(name: str) -> Any:
    return getattr(torch.ops.fastagg, name)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert torch.equal(bytes_of(x.cpu()), bytes_of(y.cpu()))


def expected_of(name: str, sample: Sample) -> list[Tensor]:
    return called(torch.ops.fastagg, name, sample, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        torch.library.opcheck(op_of(name).default, moved(sample))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_a_graph_break(name: str, rng: torch.Generator) -> None:
    compiled = torch.compile(op_of(name), fullgraph=True, backend="aot_eager", dynamic=False)
    for sample in samples(rng)[name][:2]:
        call = moved(sample)
        assert_equal(results(name, call, compiled(*call)), expected_of(name, sample))
    torch._dynamo.reset()


def test_a_compiled_round(rng: torch.Generator) -> None:
    """By inductor, with arithmetic of torch's own between the ops."""

    def round_of(A: Tensor, Bt: Tensor, c: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        ops.reconstruct_(base, A, Bt, c)
        return (*ops.gram_svd(A, Bt, c * 2, rank=3), *ops.gram(A, Bt), base * 2)

    A, Bt = random_stack(rng, 2, 6, 9, 7)
    call = A, Bt, torch.rand(2, 6, generator=rng), normal(rng, 2, 9, 7)
    expected = round_of(*moved(call))
    found = torch.compile(round_of, fullgraph=True)(*moved(call))
    torch._dynamo.reset()
    assert_equal(list(found), list(expected))


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_and_autocast(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        expected = expected_of(name, sample)
        with torch.inference_mode():
            assert_equal(expected_of(name, sample), expected)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert_equal(expected_of(name, sample), expected)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph_and_replayed(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        op, call = op_of(name), moved(sample)
        op(*moved(sample))  # a kernel's first launch loads it, which a capture may not see
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = op(*call)
        for factor in (1.0, 0.5):
            changed = moved(sample)
            for tensor in tensors_of(changed):
                if tensor.is_floating_point():
                    tensor.mul_(factor)
            for there, value in zip(tensors_of(call), tensors_of(changed), strict=True):
                there.untyped_storage().copy_(value.untyped_storage())
            for tensor in tensors_of(returned):
                tensor.untyped_storage().fill_(255)
            graph.replay()
            expected = results(name, changed, op(*changed))
            assert_equal(results(name, call, returned), expected)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_current_stream_alone(name: str, rng: torch.Generator) -> None:
    """The arguments arrive late on a side stream; the default stream is busy for longer than that."""
    for sample in samples(rng)[name][:2]:
        expected = expected_of(name, sample)
        source, call = moved(sample), moved(sample)
        for tensor in tensors_of(call):
            tensor.untyped_storage().fill_(0)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        torch.cuda._sleep(LONG)
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 10)
            for there, value in zip(tensors_of(call), tensors_of(source), strict=True):
                there.untyped_storage().copy_(value.untyped_storage(), non_blocking=True)
            found = [tensor.clone() for tensor in results(name, call, op_of(name)(*call))]
            assert not side.query(), "the host has waited for the device"
            side.synchronize()
        assert not torch.cuda.current_stream().query(), "the default stream had work to wait for"
        assert_equal(found, expected)


def with_tables_on_the_cpu(name: str, sample: Sample, *, pinned: bool) -> Sample:
    """The arguments on the GPU, but for those that may lie on the CPU."""

    def place(i: int, value: Any, there: Any) -> Any:
        if i not in WITH_TABLES.get(name, ()) or not isinstance(value, Tensor):
            return there
        return value.pin_memory() if pinned else value

    pairs = zip(sample, moved(sample), strict=True)
    return tuple(place(i, value, there) for i, (value, there) in enumerate(pairs))


@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits(name: str, rng: torch.Generator) -> None:
    """Nor for the upload of a table in pinned memory."""
    for sample in samples(rng)[name]:
        calls = [moved(sample), with_tables_on_the_cpu(name, sample, pinned=True)]
        for call in calls:
            op_of(name)(*call)  # a kernel's first launch loads it, which may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(LONG // 10)
            for call in calls:
                op_of(name)(*call)
            busy = not torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert busy, "the host has waited for the device"


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_on_the_cpu(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        mixed = with_tables_on_the_cpu(name, sample, pinned=False)
        returned = op_of(name)(*mixed)
        assert all(tensor.is_cuda for tensor in tensors_of(returned))
        assert_equal(results(name, mixed, returned), expected_of(name, sample))
        torch.library.opcheck(op_of(name).default, mixed)


def test_impossible_rows_on_the_device_are_skipped_and_flagged(rng: torch.Generator) -> None:
    bucket = random_bucket(rng, ranks=[3, 5], modules=2)
    flats, sizes = moved(bucket.flats), bucket.sizes()
    good = ops.stack(flats, bucket.slots.cuda(), dtype=torch.float32, **sizes)
    wrong = [(0, 2), (0, -1), (1, 2**40), (2, -1), (3, 2), (4, 2**62), (5, 3), (7, -8), (8, -1)]
    for column, value in wrong:
        slots = bucket.slots.clone()
        slots[1, column] = value
        A, Bt, nonfinite, sums = ops.stack(flats, slots.cuda(), dtype=torch.float32, **sizes)
        assert nonfinite[1].tolist() == [-1, -1]
        module, row, rank = bucket.slots[1, :3].tolist()
        kept = torch.ones(2, sizes["rows"], dtype=torch.bool, device="cuda")
        kept[module, row : row + rank] = False
        for found, expected in ((A, good[0]), (Bt, good[1]), (sums[0], good[3][0])):
            assert torch.equal(found[kept], expected[kept])
            assert not found[~kept].any()
    flat = torch.ones(16, device="cuda")
    spans = torch.tensor([[0, 16, 0], [0, 17, 0], [-4, 1, 0], [0, 1, 3], [2**62, 2**62, 1]])
    assert ops.scan(flat, spans.cuda())[0].tolist() == [0, -1, -1, -1, -1]


def test_impossible_hand_outs_on_the_device_write_nothing(rng: torch.Generator) -> None:
    U, S, Vt = moved((normal(rng, 1, 6, 4), torch.ones(1, 4), normal(rng, 1, 4, 5)))
    good = [0, 2, 0, 0, 0, 40, 0]
    scalings = torch.ones(1, dtype=torch.float64, device="cuda")
    for column, value in [(0, 1), (1, 2**62), (2, 1), (3, 57), (4, 3), (5, -4), (6, -1)]:
        slots = torch.tensor([good])
        slots[0, column] = value
        flat = torch.full((96,), 7, dtype=torch.uint8, device="cuda")
        ops.redistribute_([flat], U, S, Vt, slots.cuda(), scalings)
        assert (flat == 7).all()


def test_arguments_on_two_devices() -> None:
    A, Bt = torch.ones(2, 5, 7), torch.ones(2, 5, 9)
    slots = torch.zeros(0, 9, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"'Bt': expected a tensor on cuda:0.*got one on cpu; move"):
        ops.gram(A.cuda(0), Bt)
    with pytest.raises(RuntimeError, match=r"'A': expected a tensor on cuda .*got one on cpu; move"):
        ops.gram(A, Bt.cuda(0))
    with pytest.raises(RuntimeError, match="'coefficients': expected a tensor on cuda:0"):
        ops.reconstruct(A.cuda(0), Bt.cuda(0), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match=r"'flats': expected a tensor on cuda .*got one on cpu"):
        ops.stack([A], slots, modules=1, rows=1, m=1, n=1, dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_that_is_not_the_current_one(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        with torch.cuda.device(0):
            found = called(torch.ops.fastagg, name, sample, "cuda:1")
            assert torch.cuda.current_device() == 0
        assert_equal(found, expected_of(name, sample))


@pytest.mark.parametrize("name", NAMES)
def test_temporary_memory_is_given_back(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        call = moved(sample)
        before = torch.cuda.memory_allocated()
        op_of(name)(*call)
        assert torch.cuda.memory_allocated() == before


def peak_of(call: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def test_no_update_is_ever_held(rng: torch.Generator) -> None:
    A, Bt = moved(random_stack(rng, 4, 64, 2048, 2048, torch.bfloat16))
    base = torch.zeros(4, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    c, owners = torch.rand(4, 64, device="cuda"), torch.zeros(4, 64, dtype=torch.int64, device="cuda")
    update = base.numel() * 4
    for call in (
        lambda: ops.reconstruct_(base, A, Bt, c),
        lambda: ops.update_gram(A, Bt, c, owners, clients=2),
        lambda: ops.gram_svd(A, Bt, c, rank=16),
        lambda: ops.randomized_svd(A, Bt, c, rank=16, oversampling=16),
    ):
        assert peak_of(call) <= update // 2


@pytest.fixture
def room() -> Iterator[None]:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("less than 30 GB of GPU memory is free")
    yield
    torch.cuda.empty_cache()


def test_slabs_of_more_than_two_to_the_31_elements(room: None) -> None:
    rows, n, m = 33, 2**26 + 3, 5
    generator = torch.Generator("cuda").manual_seed(0)
    flat = torch.randn(rows * n, generator=generator, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(m, rows, generator=generator, device="cuda", dtype=torch.bfloat16)
    assert flat.numel() > 2**31
    slots = torch.tensor([[0, 0, rows, 0, 0, 1, 1, 0, 1]])
    A, Bt, nonfinite, sums = ops.stack(
        [flat, b], slots, modules=1, rows=rows, m=m, n=n, dtype=torch.bfloat16
    )
    assert torch.equal(A.view(-1), flat)
    assert torch.equal(Bt[0], b.T)
    assert not nonfinite.any()
    last = A[0, -1].double()
    torch.testing.assert_close(sums[0, 0, -1], last.square().sum(), rtol=1e-12, atol=0)
    counts, total = ops.scan(flat, torch.tensor([[0, flat.numel(), 1]]))
    assert counts.tolist() == [0]
    torch.testing.assert_close(total[0], sums[0].sum(), rtol=1e-12, atol=0)
    gram, _ = ops.gram(A, Bt)
    torch.testing.assert_close(gram[0, -1, -1], last.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gram[0, 0, -1], A[0, 0].double() @ last, rtol=0, atol=1e-6)


def test_an_update_of_more_than_two_to_the_31_elements(room: None) -> None:
    m, n = 2**16 + 7, 2**15 + 5
    generator = torch.Generator("cuda").manual_seed(0)
    A = torch.randn(1, 4, n, generator=generator, device="cuda")
    Bt = torch.randn(1, 4, m, generator=generator, device="cuda")
    assert m * n > 2**31
    base = torch.zeros(1, m, n, dtype=torch.bfloat16, device="cuda")
    ops.reconstruct_(base, A, Bt)
    for row in (0, m // 2, m - 1):
        expected = Bt[0, :, row].double() @ A[0].double()
        torch.testing.assert_close(base[0, row].double(), expected, rtol=2.0**-8, atol=1e-5)
    U, S, Vt, _ = ops.randomized_svd_dense(base, rank=4, oversampling=4)
    found = (U[0, -1].double() * S[0].double()) @ Vt[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
