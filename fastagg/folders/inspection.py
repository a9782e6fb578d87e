"""What `fastagg inspect` measures of an adapter, without ever forming a delta weight."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastagg.dtypes import dtype_name
from fastagg.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from fastagg.adapter import Adapter

# Share of |dW|_F^2 whose rank an inspected spectrum reports: FLoRIST's range of thresholds.
ENERGIES = (0.9, 0.99)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one delta weight.

    Attributes:
        singular_values: descending, of scaling * B A.
        effective_rank: exp of the entropy of the values' shares of their sum (Roy, Vetterli 2007).
        stable_rank: |dW|_F^2 / sigma_1^2.
        numerical_rank: the number of values above rounding.
        energy_ranks: share of |dW|_F^2 -> the least rank that keeps it.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    energy_ranks: dict[str, int]


@dataclass(frozen=True)
class ModuleMeasures:
    """One module of an adapter; `norm` is |dW|_F, None where a factor is not finite."""

    module: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    dtypes: tuple[str, str]
    norm: float | None
    nonfinite: int
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class AdapterMeasures:
    """One adapter; `ranks`, `scalings` and `dtypes` map each value to its number of modules."""

    name: str
    base_model: str | None
    ranks: dict[str, int]
    scalings: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    nbytes: int
    norm: float | None
    nonfinite: int
    whole_tensors: tuple[str, ...]
    modules: tuple[ModuleMeasures, ...]

    def to_dict(self) -> dict[str, object]:
        """The measures as a JSON-able dictionary."""
        return dataclasses.asdict(self)


def measure(adapter: Adapter, *, spectrum: bool = False, pattern: str | None = None) -> AdapterMeasures:
    """Measure an adapter: ranks, scalings, norms, dtypes, sizes, and spectra where asked.

    Args:
        adapter: the adapter.
        spectrum: also the singular values of each delta weight, O((m + n) r^2) a module.
        pattern: shell pattern (`*.q_proj`); only modules that match are measured.

    Raises:
        InvalidInput: no module matches the pattern.
    """
    chosen = [slot for slot in adapter.layout.slots if _matches(slot.module, pattern)]
    if pattern is not None and not chosen:
        raise InvalidInput(
            "no module matches the pattern",
            client=adapter.name,
            field="--module",
            expected=f"one of {', '.join(adapter.modules[:3])}, ..",
            got=pattern,
            cure="Patterns are those of a shell and match the whole name: '*q_proj'",
        )
    nonfinite = _nonfinite(adapter)
    modules = tuple(
        _measure_module(adapter, slot.module, slot.kind, slot.weight_shape, nonfinite, spectrum)
        for slot in chosen
    )
    norms = [module.norm for module in modules]
    return AdapterMeasures(
        name=adapter.name or "adapter",
        base_model=adapter.config.base_model,
        ranks=_counts(module.rank for module in modules),
        scalings=_counts(f"{module.scaling:.6g}" for module in modules),
        dtypes=_counts(dtype for module in modules for dtype in module.dtypes),
        parameters=sum(slot.rank * (slot.m + slot.n) for slot in chosen),
        nbytes=adapter.nbytes,
        norm=None
        if any(norm is None for norm in norms)
        else math.sqrt(math.fsum(norm * norm for norm in norms if norm is not None)),
        nonfinite=sum(nonfinite.values()),
        whole_tensors=tuple(span.key for span in adapter.layout.whole),
        modules=modules,
    )


def delta_norm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> float:
    """|scaling * B A|_F of A (r, n) and B (m, r) from their r x r Gram matrices in float64.

    O((m + n) r^2); nothing of size m x n is formed.
    """
    a, b = a.double(), b.double()
    squared = ((b.mT @ b) * (a @ a.mT)).sum().item()
    return abs(scaling) * math.sqrt(max(squared, 0.0))


def spectrum_of(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Spectrum:
    """The spectrum of scaling * B A, A (r, n) and B (m, r), to 1e-6 of its largest value."""
    from fastagg.linalg import truncated_svd

    rank = min(a.shape[0], a.shape[1], b.shape[0])
    _, values, _, info = truncated_svd(a, b, rank, route="gram")
    sigma = [abs(scaling) * value for value in values.double().tolist()]
    total, energy = math.fsum(sigma), math.fsum(s * s for s in sigma)
    if total == 0.0:
        return Spectrum(tuple(sigma), 0.0, 0.0, 0, {str(share): 0 for share in ENERGIES})
    shares = [s / total for s in sigma if s > 0.0]
    return Spectrum(
        singular_values=tuple(sigma),
        effective_rank=math.exp(-math.fsum(p * math.log(p) for p in shares)),
        stable_rank=energy / sigma[0] ** 2,
        numerical_rank=int(info.numerical_rank[0]),
        energy_ranks={str(share): _rank_keeping(sigma, share * energy) for share in ENERGIES},
    )


def _rank_keeping(sigma: list[float], energy: float) -> int:
    kept = 0.0
    for rank, value in enumerate(sigma, start=1):
        kept += value * value
        if kept >= energy:
            return rank
    return len(sigma)


def _measure_module(
    adapter: Adapter,
    module: str,
    kind: str,
    shape: tuple[int, ...],
    nonfinite: dict[str, int],
    spectrum: bool,
) -> ModuleMeasures:
    a, b = adapter.factors(module)
    bad = nonfinite.get(module, 0)
    scaling = adapter.scaling(module)
    return ModuleMeasures(
        module=module,
        kind=kind,
        shape=tuple(shape),
        rank=adapter.rank(module),
        scaling=scaling,
        dtypes=(_dtype_name(a), _dtype_name(b)),
        norm=None if bad else delta_norm(a, b, scaling),
        nonfinite=bad,
        spectrum=spectrum_of(a, b, scaling) if spectrum and not bad else None,
    )


def _nonfinite(adapter: Adapter) -> dict[str, int]:
    """Module, or key of a whole tensor -> the number of its NaN and infinite values, if any."""
    from fastagg import ops

    owners = {span.key: slot.module for slot in adapter.layout.slots for span in (slot.a, slot.b)}
    bad, _ = ops.scan(adapter.flat, adapter.layout.spans_table)
    found: Counter[str] = Counter()
    for span, count in zip(adapter.layout.tensors, bad.tolist(), strict=True):
        if count:
            found[owners.get(span.key, span.key)] += count
    return dict(found)


def _matches(module: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(module, pattern)


def _dtype_name(tensor: torch.Tensor) -> str:
    return dtype_name(tensor.dtype)


def _counts(values: Iterable[str] | Iterable[int]) -> dict[str, int]:
    counted: Counter[str | int] = Counter(values)
    return {str(value): counted[value] for value in sorted(counted)}
