"""What a client is handed: the last of a method's three choices.

Every hand-out is a factorisation U diag(S) Vt of the aggregate, of which an adapter of rank r takes
the first r columns: A = Vt[:r], B = U[:, :r] diag(S[:r]) / s with the client's own scaling s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastagg import linalg, ops
from fastagg.accumulators import Chunk
from fastagg.devices import pinned
from fastagg.errors import InvalidInput
from fastagg.planning.plan import stream_of

__all__ = ["ClientStack", "Factored", "Figures", "FirstRows", "Handout", "Settings", "TruncatedSVD"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Figures:
    """What :class:`Factored` knows of its quality, on the host: a number for each module, or None.

    Attributes:
        kept: by rank.
        largest: of all modules; inf where it is not known.
    """

    kept: dict[int, list[float]]
    norm2: list[float] | None
    certificate: list[float] | None
    numerical_rank: list[float] | None
    largest: float


@dataclass(frozen=True, eq=False)
class Factored:
    """The factorisation of L modules and what is known of its quality, all on the device at work.

    Attributes:
        u, s, vt: (L, m, r), (L, r), (L, r, n) float32.
        route: how it was computed.
        kept: rank -> (L,) share of |dW|_F^2 that this many columns keep.
        largest: (L,) from above, the magnitude of the entries of U diag(S) and of Vt; None where it
            is not known.
        norm2: (L,) |dW|_F^2 of what was factored; None where it was not computed.
        certificate: (L,) upper bound of error^2 - optimal^2 at rank r; None for no decomposition.
        numerical_rank: (L,) the number of columns that carry weight.
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    route: str
    kept: Callable[[int], torch.Tensor]
    largest: torch.Tensor | None = None
    norm2: torch.Tensor | None = None
    certificate: torch.Tensor | None = None
    numerical_rank: torch.Tensor | None = None

    def figures(self, ranks: Sequence[int]) -> Figures:
        """The figures, with what these ranks keep: one copy from the device, which is waited for."""
        known = [self.norm2, self.certificate, self.numerical_rank, self.largest]
        columns = [*(self.kept(rank) for rank in ranks), *(each for each in known if each is not None)]
        table = iter(torch.stack(columns).tolist() if columns else [])
        kept = {rank: next(table) for rank in ranks}
        norm2, certificate, numerical_rank, largest = (
            None if each is None else next(table) for each in known
        )
        return Figures(
            kept, norm2, certificate, numerical_rank, math.inf if largest is None else max(largest)
        )


@dataclass(frozen=True)
class Settings:
    """What the user chose for the decomposition, and the device that computes it."""

    route: str = "auto"
    seed: int = 0
    device: torch.device = _CPU


class Handout(Protocol):
    """How an aggregate becomes the clients' next adapters."""

    @property
    def ranked(self) -> bool:
        """Each client gets an adapter of its own rank; otherwise all get the stack."""

    @property
    def base_effect(self) -> str:
        """What it does to the base weights, in a sentence."""

    def check_rank(self, rank: int, largest: int) -> None:
        """Refuses a rank that it cannot hand out; ``largest`` is the largest of the clients'."""

    def route(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> str:
        """How ``factor`` will compute a module, as reports say it; the arguments of work_bytes."""

    def work_bytes(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> int:
        """Bytes that ``factor`` takes for a module from above, its result included.

        Args:
            rows: of its slabs; 0 where dW itself is held.
        """

    def factor(self, chunk: Chunk, width: int, settings: Settings) -> Factored:
        """The factorisation of a chunk, for ranks up to ``width``, by the route of the settings.

        The chunk of a hand-out that is not ranked has its coefficients multiplied into A.
        """


@dataclass(frozen=True)
class TruncatedSVD:
    """Each client gets the best approximation of dW of its rank (Eckart and Young)."""

    ranked: bool = True
    base_effect: str = "none: each client's adapter is replaced by its best approximation of dW"

    def check_rank(self, rank: int, largest: int) -> None:
        """Every rank will do."""

    def route(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> str:
        """The route asked for, or the one that the cost model takes."""
        if not rows:
            return "dense"
        if settings.route != "auto":
            return settings.route
        return linalg.fastest_route(m, n, rows, 2 * rank, device=settings.device)

    def work_bytes(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> int:
        """As measured: R x R problems, sketches of 2 r columns, float64 copies, dW.

        The CUDA kernels' own temporaries are counted out: 21 matrices of R x R and, for the QR of a
        module whose clients cancel, two blocks' scratch; a sketch and the basis beside it, and 16
        matrices of their width, which is that of dW where dW is hardly wider.
        """
        columns = min(2 * rank, m, n)
        result = 4 * rank * (m + n + 1)
        sketch = 16 * columns * (m + n)
        gram = small = 8 * 14 * rows**2
        if settings.device.type == "cuda":
            if min(m, n) <= max(2 * columns, 64):
                columns = min(m, n)
            sketch = 4 * columns * (2 * (m + n) + rows + 2 * n + 32 * columns)
            gram = 8 * (21 * rows**2 + 2 * max(m, n) * (rows + min(rank, rows)))
        if not rows:
            return result + sketch
        copies = 16 * rows * (m + n)
        return result + {
            "gram": gram,
            "qr": small + 2 * copies,
            "randomized": sketch,
            "dense": 4 * m * n + copies + sketch,
        }[self.route(m, n, rows, rank, settings)]

    def factor(self, chunk: Chunk, width: int, settings: Settings) -> Factored:
        """One decomposition at the largest rank, which serves every smaller one."""
        rank = min(width, chunk.m, chunk.n)
        numbers = torch.tensor([stream_of(module) for module in chunk.modules])
        streams = pinned(numbers, settings.device)
        if chunk.dense is not None:
            found = linalg.svd_of_dense(chunk.dense, rank, seed=settings.seed, streams=streams)
        else:
            found = linalg.svd_of_stack(
                *chunk.factors,
                chunk.coefficients,
                rank,
                route=settings.route,
                seed=settings.seed,
                streams=streams,
            )
        return Factored(
            found.U,
            found.S,
            found.Vt,
            found.route,
            lambda r: found.kept(min(r, rank)),
            # U and V are orthonormal.
            found.S.amax(1).clamp(min=1.0),
            found.norm2,
            found.certificate,
            found.numerical_rank,
        )


@dataclass(frozen=True)
class FirstRows:
    """Each client gets the first rows of the mean factors, as many as its rank.

    Attributes:
        whole: only the full rank is handed out.
    """

    whole: bool = False
    ranked: bool = True
    base_effect: str = "none: each client's adapter is replaced by the averaged factors"

    def check_rank(self, rank: int, largest: int) -> None:
        """With ``whole``, refuses every rank but the clients' own.

        Raises:
            InvalidInput: it is another.
        """
        if self.whole and rank != largest:
            raise InvalidInput(
                "a method for equal ranks hands out that rank only",
                field="rank",
                expected=largest,
                got=rank,
                cure="Use method zeropad, which hands out the first rows, or flexlora",
            )

    def route(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> str:
        """Nothing is decomposed."""
        return "first rows"

    def work_bytes(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> int:
        """Gram matrices, B once more, the sums' quotients, and what the allocator holds back."""
        return 8 * 4 * rows**2 + 4 * rows * (4 * m + 3 * n + 2)

    def factor(self, chunk: Chunk, width: int, settings: Settings) -> Factored:
        """The mean factors as they are: U = B, S = 1, Vt = A."""
        a, bt = chunk.factors
        gram_a, gram_b = ops.gram(a, bt)
        # |sum_i b_i a_i|^2 over any rows is the sum of this over the same rows and columns.
        overlap = gram_a * gram_b
        norm2 = overlap.sum((1, 2))

        def kept(rank: int) -> torch.Tensor:
            lost = overlap[:, rank:, rank:].sum((1, 2))
            return 1 - lost / norm2.clamp(min=torch.finfo(norm2.dtype).tiny)

        ones = torch.ones(a.shape[:2], dtype=torch.float32, device=a.device)
        return Factored(bt.mT.contiguous(), ones, a, "first rows", kept, norm2=norm2)


@dataclass(frozen=True)
class ClientStack:
    """Every client gets the whole stack, which is dW itself at the sum of all ranks."""

    ranked: bool = False
    base_effect: str = (
        "each client merges the stack into its base weights (W += dW) and starts a fresh LoRA"
    )

    def check_rank(self, rank: int, largest: int) -> None:
        """Refuses: the stack has one rank.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(
            "the stack is handed out as it is, at the sum of the clients' ranks",
            field="rank",
            expected="no rank",
            got=rank,
            cure="Take .stacked(), or aggregate with method flexlora to truncate it",
        )

    def route(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> str:
        """Nothing is decomposed."""
        return "stack"

    def work_bytes(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> int:
        """B once more, and what the allocator was seen to hold back."""
        return 4 * rows * (2 * m + n + 2)

    def factor(self, chunk: Chunk, width: int, settings: Settings) -> Factored:
        """U = [B_1 ..], S = 1, Vt = [p_1 s_1 A_1; ..]."""
        a, bt = chunk.factors
        ones = torch.ones(a.shape[:2], dtype=torch.float32, device=a.device)
        exact = torch.ones(len(chunk.modules), dtype=torch.float64, device=a.device)
        return Factored(
            bt.mT.contiguous(), ones, a, "stack", lambda rank: exact, certificate=0 * exact
        )
