"""The ops of ``torch.ops.fastagg``: typed wrappers, fake kernels, version counters.

A *bucket* is L modules of one shape (m, n). Its *stack* is two slabs: ``A`` (L, R, n), the clients'
A factors below each other, and ``Bt`` (L, R, m), their B factors transposed, with R the sum of the
clients' ranks. Scalings and weights stay apart as *coefficients* c (L, R), so that

    dW_l = sum_r c_lr  Bt_lr^T A_lr      (m, n)

and the factors are never rounded. Factors are float32, bfloat16 or float16; the SVD ops and the Gram
ops take float64 as well. Every op raises RuntimeError, naming the op, the argument, what was expected
and what came, before it writes anything. None synchronises with the host. None is differentiable:
results never require a gradient, whatever the inputs do.

All tensors of a call lie on one device, on whose current stream the op runs. Only what tells a kernel
what to do (`spans`, `slots`, `scale`, `owners`, `streams`, `scalings`) may lie on the CPU instead: there
every value is checked, and then copied to the device, without a wait from pinned memory (which must stay
as it is until the op has run). Where these lie on a GPU the host never reads them: impossible rows of a
table are skipped, and counted as -1 in `nonfinite` where the op returns it, owners outside of the
clients are nobody, and that two slots do not fill the same memory and no scaling is zero is the
caller's to see to. A CUDA graph captures every op whose arguments all lie on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastagg import _library
from fastagg.dtypes import DTYPE_CODES as DTYPE_CODES

_library.require(_library.OPS)

_ops = torch.ops.fastagg

Route = Literal["auto", "kernel", "library"]
"""How a GPU makes a product: as was measured to be faster, by FastAgg's kernel, or by cuBLAS."""

_ROUTES: dict[Route, int] = {"auto": 0, "kernel": 1, "library": 2}


def scan(flat: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """Non-finite counts (T,) int64 and sums of squares (T,) float64 of T tensors in a flat buffer.

    flat: a buffer of bytes (any dtype). spans: int64 (T, 3), each row a tensor's byte offset, element
    count and dtype code. One pass over the data.
    """
    return _ops.scan(flat, spans)  # type: ignore[no-any-return]


def stack(
    flats: Sequence[Tensor],
    slots: Tensor,
    scale: Tensor | None = None,
    *,
    modules: int,
    rows: int,
    m: int,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FLoRA's stack of a bucket from the clients' flat buffers, in one pass.

    slots: int64 (S, 9), each row: module, first row, rank, A's buffer, byte offset and dtype code, B's
    buffer, byte offset and dtype code; A is (rank, n) and B (m, rank), row-major, at any alignment.
    scale: float64 (S,) multiplies A (FLoRA's p_k s_k), or None.

    Returns A (L, rows, n) and Bt (L, rows, m) of `dtype`, the non-finite counts of each slot's A and B,
    int64 (S, 2), and the sums of squares of the unscaled rows of A and Bt, float64 (2, L, rows). Rows
    that no slot fills are zero.
    """
    if not flats:  # a list without tensors has no device for the dispatcher to choose a kernel by
        flats = [slots.new_empty(0)]
    return _ops.stack(flats, slots, scale, modules, rows, m, n, dtype)  # type: ignore[no-any-return]


def stack_(
    A: Tensor, Bt: Tensor, flats: Sequence[Tensor], slots: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`stack` into existing contiguous slabs of one dtype; the last two of its results.

    On a CPU a fresh slab costs more in page faults than the stacking: a loop over chunks reuses its own.
    """
    if not flats:
        flats = [A.new_empty(0)]
    return _ops.stack_(A, Bt, flats, slots, scale)  # type: ignore[no-any-return]


def reconstruct(
    A: Tensor,
    Bt: Tensor,
    coefficients: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    route: Route = "auto",
) -> Tensor:
    """dW (L, m, n) = sum_r c_r Bt_r^T A_r, summed in fp32 and rounded once. O(L m n R).

    route: "library" takes no coefficients, and one dtype for factors and result; it follows the flags of
    ``torch.backends.cuda.matmul``, which may round more. A CPU has one way, for every route.
    """
    code = _ROUTES[route]
    return _ops.reconstruct(A, Bt, coefficients, dtype, code)  # type: ignore[no-any-return]


def reconstruct_(
    base: Tensor,
    A: Tensor,
    Bt: Tensor,
    coefficients: Tensor | None = None,
    *,
    route: Route = "auto",
) -> None:
    """base (L, m, n) += sum_r c_r Bt_r^T A_r in place, in fp32, rounded once; no dW is ever held.

    An entry of the base is one of the terms of its sum: an fp32 one is added to where it lies.

    route: as :func:`reconstruct` has it.
    """
    _ops.reconstruct_(base, A, Bt, coefficients, _ROUTES[route])


def gram(A: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T and B^T B of the raw factors, both (L, R, R) float64. O(L R^2 (m + n))."""
    return _ops.gram(A, Bt)  # type: ignore[no-any-return]


def update_gram(
    A: Tensor, Bt: Tensor, coefficients: Tensor | None, owners: Tensor, *, clients: int
) -> Tensor:
    """<dW_i, dW_j> of the clients' true updates, (L, K, K) float64, without forming one.

    owners: int64 (L, R), the client of each row, or -1 for a row of nobody.
    """
    return _ops.update_gram(A, Bt, coefficients, owners, clients)  # type: ignore[no-any-return]


def gram_svd(
    A: Tensor, Bt: Tensor, coefficients: Tensor | None = None, *, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The exact truncated SVD of dW by fp64 Gram matrices: U (L, m, r), S (L, r), Vt (L, r, n), stats.

    stats, float64 (L, 3): |dW|_F^2; a bound of error^2 - optimal^2; the numerical rank. Columns beyond
    that rank are zero. A module with non-finite input is NaN throughout. O(R^2 (m + n) + R^3).
    """
    return _ops.gram_svd(A, Bt, coefficients, rank)  # type: ignore[no-any-return]


def randomized_svd(
    A: Tensor,
    Bt: Tensor,
    coefficients: Tensor | None = None,
    *,
    rank: int,
    oversampling: int,
    power_iterations: int = 2,
    seed: int = 0,
    streams: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The randomized SVD of the factored dW, with l = rank + oversampling columns; dW is never formed.

    streams: int64 (L,), a module's own random stream (default: its index), so that the test matrix
    does not depend on how modules are grouped. Returns what :func:`gram_svd` does.
    """
    return _ops.randomized_svd(  # type: ignore[no-any-return]
        A, Bt, coefficients, rank, oversampling, power_iterations, seed, streams
    )


def randomized_svd_dense(
    W: Tensor,
    *,
    rank: int,
    oversampling: int,
    power_iterations: int = 2,
    seed: int = 0,
    streams: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The randomized SVD of a dense dW (L, m, n). Returns what :func:`gram_svd` does."""
    return _ops.randomized_svd_dense(  # type: ignore[no-any-return]
        W, rank, oversampling, power_iterations, seed, streams
    )


def redistribute(
    U: Tensor, S: Tensor, Vt: Tensor, slots: Tensor, scalings: Tensor, *, sizes: Sequence[int]
) -> list[Tensor]:
    """Every client's next factors in new flat buffers of `sizes` bytes (uint8, zero elsewhere).

    slots: int64 (S, 7), each row: module, rank, buffer, A's byte offset and dtype code, B's byte offset
    and dtype code. scalings: float64 (S,), s_k. Writes FlexLoRA's A = Vt[:rank] (rank, n) and
    B = U[:, :rank] S[:rank] / s_k (m, rank); a rank beyond U's is filled with zeros.
    """
    return _ops.redistribute(U, S, Vt, slots, scalings, sizes)  # type: ignore[no-any-return]


def redistribute_(
    flats: Sequence[Tensor], U: Tensor, S: Tensor, Vt: Tensor, slots: Tensor, scalings: Tensor
) -> None:
    """:func:`redistribute` into existing contiguous buffers, which may be mapped files."""
    if flats:
        _ops.redistribute_(flats, U, S, Vt, slots, scalings)


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"fastagg::{name}")  # type: ignore[no-any-return]


@_fake("scan")
def _(flat: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    count = spans.shape[0]
    return flat.new_empty(count, dtype=torch.int64), flat.new_empty(count, dtype=torch.float64)


@_fake("stack")
def _(
    flats: list[Tensor],
    slots: Tensor,
    scale: Tensor | None,
    modules: int,
    rows: int,
    m: int,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = flats[0] if flats else slots
    return (
        like.new_empty((modules, rows, n), dtype=dtype),
        like.new_empty((modules, rows, m), dtype=dtype),
        like.new_empty((slots.shape[0], 2), dtype=torch.int64),
        like.new_empty((2, modules, rows), dtype=torch.float64),
    )


@_fake("stack_")
def _(
    A: Tensor, Bt: Tensor, flats: list[Tensor], slots: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (2, A.shape[0], A.shape[1])
    nonfinite = A.new_empty((slots.shape[0], 2), dtype=torch.int64)
    return nonfinite, A.new_empty(shape, dtype=torch.float64)


@_fake("reconstruct")
def _(
    A: Tensor, Bt: Tensor, coefficients: Tensor | None, dtype: torch.dtype, route: int = 0
) -> Tensor:
    return A.new_empty((A.shape[0], Bt.shape[2], A.shape[2]), dtype=dtype)


@_fake("reconstruct_")
def _(
    base: Tensor, A: Tensor, Bt: Tensor, coefficients: Tensor | None, route: int = 0
) -> None:
    return None


@_fake("gram")
def _(A: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
    shape = (A.shape[0], A.shape[1], A.shape[1])
    return A.new_empty(shape, dtype=torch.float64), A.new_empty(shape, dtype=torch.float64)


@_fake("update_gram")
def _(A: Tensor, Bt: Tensor, coefficients: Tensor | None, owners: Tensor, clients: int) -> Tensor:
    return A.new_empty((A.shape[0], clients, clients), dtype=torch.float64)


def _fake_svd(
    like: Tensor, wide: bool, modules: int, m: int, n: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    return (
        like.new_empty((modules, m, rank), dtype=dtype),
        like.new_empty((modules, rank), dtype=dtype),
        like.new_empty((modules, rank, n), dtype=dtype),
        like.new_empty((modules, 3), dtype=torch.float64),
    )


def _fake_factored_svd(A: Tensor, Bt: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 in (A.dtype, Bt.dtype)
    return _fake_svd(A, wide, A.shape[0], Bt.shape[2], A.shape[2], rank)


@_fake("gram_svd")
def _(
    A: Tensor, Bt: Tensor, coefficients: Tensor | None, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_factored_svd(A, Bt, rank)


@_fake("randomized_svd")
def _(
    A: Tensor,
    Bt: Tensor,
    coefficients: Tensor | None,
    rank: int,
    oversampling: int,
    power_iterations: int,
    seed: int,
    streams: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_factored_svd(A, Bt, rank)


@_fake("randomized_svd_dense")
def _(
    W: Tensor,
    rank: int,
    oversampling: int,
    power_iterations: int,
    seed: int,
    streams: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    modules, m, n = W.shape
    return _fake_svd(W, W.dtype == torch.float64, modules, m, n, rank)


@_fake("redistribute")
def _(
    U: Tensor, S: Tensor, Vt: Tensor, slots: Tensor, scalings: Tensor, sizes: list[int]
) -> list[Tensor]:
    return [U.new_empty(size, dtype=torch.uint8) for size in sizes]


@_fake("redistribute_")
def _(
    flats: list[Tensor], U: Tensor, S: Tensor, Vt: Tensor, slots: Tensor, scalings: Tensor
) -> None:
    return None


def _bumps_versions(op: Any, mutated: int) -> Callable[..., Any]:
    """An op that mutates an argument does not bump its version counter: autograd would silently use an
    overwritten weight that it had saved. The first `mutated` arguments are written to."""

    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args)
        for argument in args[:mutated]:
            for tensor in [argument] if isinstance(argument, Tensor) else argument:
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return result

    return kernel


_NAMES = (
    "scan",
    "stack",
    "stack_",
    "reconstruct",
    "reconstruct_",
    "gram",
    "update_gram",
    "gram_svd",
    "randomized_svd",
    "randomized_svd_dense",
    "redistribute",
    "redistribute_",
)

# An op without an Autograd kernel would give results that pretend to have a gradient.
_not_differentiable: Any = torch.library.Library("fastagg", "IMPL", "Autograd")  # type: ignore[no-untyped-call]
for _name in _NAMES:
    _not_differentiable.impl(_name, torch.library.fallthrough_kernel)


def _refuses(op: str) -> Callable[..., Any]:
    """What an op does with CUDA tensors where its kernel is not loaded: say why it is not."""

    def kernel(*args: Any) -> Any:
        raise NotImplementedError(
            f"fastagg::{op}: expected CPU tensors, got CUDA tensors, and the CUDA kernels cannot be "
            f"used: {_library.CUDA.error}"
        )

    return kernel


if not _library.CUDA.loaded:
    _no_cuda: Any = torch.library.Library("fastagg", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    for _name in _NAMES:
        _no_cuda.impl(_name, _refuses(_name))

_versions: Any = torch.library.Library("fastagg", "IMPL", "ADInplaceOrView")  # type: ignore[no-untyped-call]
_versions.impl("stack_", _bumps_versions(_ops.stack_.default, 2))
_versions.impl("reconstruct_", _bumps_versions(_ops.reconstruct_.default, 1))
_versions.impl("redistribute_", _bumps_versions(_ops.redistribute_.default, 1))
