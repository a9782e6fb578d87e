"""What every op owes to torch: opcheck, torch.compile, autograd, inference mode, threads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_samples import MUTATED, NAMES, Sample, samples
from stacks import normal, product, random_stack
from torch import Tensor

from fastagg import ops

# torch's inductor meets its own torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def copied(sample: Sample) -> Sample:
    """The same arguments in memory of their own: what an op mutates is compared afterwards."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone(memory_format=torch.preserve_format)
        return [copy(item) for item in value] if isinstance(value, list) else value

    return tuple(copy(value) for value in sample)


def results(name: str, sample: Sample) -> list[Tensor]:
    """What an op returns, and what it changed."""
    call = copied(sample)
    returned = getattr(torch.ops.fastagg, name)(*call)
    return tensors_of(returned) + tensors_of(call[: MUTATED.get(name, 0)])


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert torch.equal(x, y)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, rng: torch.Generator) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch with dynamic shapes."""
    for sample in samples(rng)[name]:
        torch.library.opcheck(getattr(torch.ops.fastagg, name).default, sample)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_inputs_that_require_a_gradient(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name][:2]:
        call = list(copied(sample))
        for i in range(MUTATED.get(name, 0), len(call)):
            if isinstance(call[i], Tensor) and call[i].is_floating_point():
                call[i] = call[i].requires_grad_()
        torch.library.opcheck(getattr(torch.ops.fastagg, name).default, tuple(call))
        returned = getattr(torch.ops.fastagg, name)(*call)
        assert not any(tensor.requires_grad for tensor in tensors_of(returned))


@pytest.mark.parametrize("name", NAMES)
def test_the_fake_kernel_tells_what_comes(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        meta = tuple(
            [t.to("meta") for t in value]
            if isinstance(value, list) and value and isinstance(value[0], Tensor)
            else value.to("meta")
            if isinstance(value, Tensor)
            else value
            for value in sample
        )
        fake = tensors_of(getattr(torch.ops.fastagg, name)(*meta))
        real = tensors_of(getattr(torch.ops.fastagg, name)(*copied(sample)))
        for x, y in zip(fake, real, strict=True):
            assert x.is_meta
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_a_graph_break(name: str, rng: torch.Generator) -> None:
    op = getattr(torch.ops.fastagg, name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    for sample in samples(rng)[name][:2]:
        call = copied(sample)
        returned = tensors_of(compiled(*call))
        changed = tensors_of(call[: MUTATED.get(name, 0)])
        assert_equal(returned + changed, results(name, sample))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_round(backend: str, rng: torch.Generator) -> None:
    """Several ops in one graph, among them one that mutates what another reads.

    No arithmetic of torch's own between them: inductor would compile C++ for it, for ten seconds.
    """

    def round_of(A: Tensor, Bt: Tensor, c: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        ops.reconstruct_(base, A, Bt, c)
        ops.reconstruct_(base, A, Bt)
        sketch = ops.randomized_svd_dense(base, rank=2, oversampling=2)
        return (*ops.gram_svd(A, Bt, c, rank=3), *ops.gram(A, Bt), *sketch)

    A, Bt = random_stack(rng, 2, 6, 9, 7)
    c, base = torch.rand(2, 6, generator=rng), normal(rng, 2, 9, 7)
    expected_base = base.clone()
    expected = round_of(A, Bt, c, expected_base)
    try:
        found = torch.compile(round_of, fullgraph=True, backend=backend)(A, Bt, c, base)
    finally:
        torch._dynamo.reset()
    assert_equal([base, *found], [expected_base, *expected])


def test_a_compiled_op_with_dynamic_shapes(rng: torch.Generator) -> None:
    compiled = torch.compile(
        lambda A, Bt: ops.reconstruct(A, Bt), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows, m, n in [(5, 9, 7), (8, 3, 20), (13, 6, 6)]:
        A, Bt = random_stack(rng, 2, rows, m, n)
        assert torch.equal(compiled(A, Bt), ops.reconstruct(A, Bt))
    torch._dynamo.reset()


def hand_out(rng: torch.Generator) -> tuple[Tensor, ...]:
    U, S, Vt = normal(rng, 1, 4, 2), torch.rand(1, 2, generator=rng), normal(rng, 1, 2, 3)
    slots = torch.tensor([[0, 2, 0, 0, 0, 24, 0]])
    return U, S, Vt, slots, torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
def test_autograd_sees_that_a_saved_base_was_overwritten(grad: bool, rng: torch.Generator) -> None:
    """The weight is saved for the gradient of x; adding to it afterwards must not go unnoticed."""
    A, Bt = random_stack(rng, 1, 2, 4, 3)
    weight = normal(rng, 4, 3)
    x = normal(rng, 5, 4).requires_grad_()
    y = (x @ weight).sum()
    with torch.set_grad_enabled(grad):
        ops.reconstruct_(weight[None], A, Bt)
    assert weight._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autograd_sees_that_a_saved_buffer_was_overwritten(rng: torch.Generator) -> None:
    flat = torch.zeros(14)
    x = normal(rng, 14).requires_grad_()
    y = (x * flat).sum()
    ops.redistribute_([torch.zeros(56, dtype=torch.uint8), flat], *hand_out(rng))
    assert flat._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autograd_sees_that_a_saved_slab_was_overwritten(rng: torch.Generator) -> None:
    flats, slots = [torch.ones(6)], torch.tensor([[0, 0, 1, 0, 0, 0, 0, 12, 0]])
    for saved in (0, 1):
        slabs = [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)]
        x = normal(rng, 3).requires_grad_()
        y = (x * slabs[saved]).sum()
        ops.stack_(*slabs, flats, slots)
        assert slabs[saved]._version == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_every_view_of_a_mutated_base_is_bumped(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 2, 4, 3)
    big = normal(rng, 3, 9)
    for view in (big[:, 2:6].mT[None], big[:3, :4].mT[None]):
        before = big._version
        ops.reconstruct_(view, A, Bt)
        assert big._version > before
    inputs = A._version, Bt._version
    ops.reconstruct(A, Bt)
    assert (A._version, Bt._version) == inputs


def test_the_gradient_of_what_a_constant_was_added_to(rng: torch.Generator) -> None:
    """dW is a constant: a base that depends on a parameter keeps its own gradient."""
    A, Bt = random_stack(rng, 1, 2, 4, 3)
    parameter = normal(rng, 1, 4, 3).requires_grad_()
    base = parameter * 3
    ops.reconstruct_(base, A.requires_grad_(), Bt)
    torch.testing.assert_close(base.detach(), (parameter * 3 + product(A, Bt)).float().detach())
    base.sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))
    assert A.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_no_grad_and_autocast(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        expected = results(name, sample)
        with torch.inference_mode():
            assert_equal(results(name, sample), expected)
        with torch.no_grad():
            assert_equal(results(name, sample), expected)
        # Autocast would round the products inside to bf16.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(results(name, sample), expected)


def test_a_normal_base_mutated_in_inference_mode_is_bumped(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 2, 4, 3)
    base = normal(rng, 1, 4, 3)
    with torch.inference_mode():
        ops.reconstruct_(base, A, Bt)
        ops.reconstruct_(torch.zeros(1, 4, 3), A, Bt)
    assert base._version == 1


def large_samples(rng: torch.Generator) -> dict[str, list[Sample]]:
    """Sizes with several tasks for every kernel, ragged at the end."""
    A, Bt = random_stack(rng, 3, 210, 1100, 530, torch.bfloat16)
    c = torch.rand(3, 210, generator=rng)
    # One module whose clients cancel takes the QR inside gram_svd.
    A[1, 100:200], Bt[1, 100:200], c[1] = A[1, :100], -Bt[1, :100], 1.0
    owners = torch.randint(-1, 5, (3, 210), generator=rng)
    flat = normal(rng, 700_001)
    U, S, Vt = normal(rng, 1, 1100, 30), torch.rand(1, 30, generator=rng), normal(rng, 1, 30, 530)
    slots = torch.tensor([[0, 30, 0, 1, 1, 40_000, 2], [0, 17, 1, 0, 0, 40_001, 0]])
    stacked = torch.tensor([[m, 0, 37, 0, 4 * m, 0, 0, 100_000, 0] for m in range(3)])
    scalings = torch.ones(2, dtype=torch.float64)
    scales = torch.rand(3, generator=rng, dtype=torch.float64)
    return {
        "scan": [(flat, torch.tensor([[0, 700_001, 0], [404, 300_000, 0]]))],
        "stack": [([flat], stacked, None, 3, 40, 2100, 530, torch.bfloat16)],
        "stack_": [
            (torch.zeros(3, 40, 530), torch.zeros(3, 40, 2100), [flat], stacked, scales),
        ],
        "reconstruct": [(A, Bt, c, torch.float16), (A.float(), Bt, None, torch.float32)],
        "reconstruct_": [(normal(rng, 3, 1100, 530), A, Bt, c)],
        "gram": [(A, Bt)],
        "update_gram": [(A, Bt, c, owners, 5)],
        "gram_svd": [(A, Bt, c, 24)],
        "randomized_svd": [(A, Bt, c, 24, 24, 2, 1, None)],
        "randomized_svd_dense": [(normal(rng, 2, 1100, 530), 24, 24, 1, 1, None)],
        "redistribute": [(U, S, Vt, slots, scalings, [120_000, 160_000])],
        "redistribute_": [
            ([torch.zeros(160_000, dtype=torch.uint8) for _ in range(2)], U, S, Vt, slots, scalings)
        ],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_threads(name: str, rng: torch.Generator, threads: None) -> None:
    for sample in large_samples(rng)[name]:
        torch.set_num_threads(1)
        expected = results(name, sample)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_equal(results(name, sample), expected)


def test_nothing_is_said_on_the_way(rng: torch.Generator) -> None:
    """No op warns: not of resized results, not of missing autograd kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, each in samples(rng).items():
            for sample in each:
                results(name, sample)


def test_one_argument_on_another_device(rng: torch.Generator) -> None:
    """A meta tensor stands for a GPU's: the dispatcher sends the call to the other device's kernel."""
    A, Bt = random_stack(rng, 1, 2, 4, 3)
    assert ops.reconstruct(A.to("meta"), Bt).is_meta
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        ops.reconstruct(A.to_sparse(), Bt)
