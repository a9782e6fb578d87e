"""Adding a module's delta weight into the base weight that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fastagg.adapter import Adapter
from fastagg.dtypes import dtype_name
from fastagg.errors import InvalidInput

# What fastagg.ops.reconstruct_ adds into; float64 goes through torch, in float64.
_MERGEABLE = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class Delta:
    """One module's dW (m x n), and how to add it into a matrix.

    Attributes:
        module: the module's canonical name.
        kind: "linear", "embedding" or "conv2d".
        m, n: the rows and columns of dW.
        weight_shape: the base weight's own shape, where `transposed` says how it lies.
        transposed: the base weight is stored as dW's transpose (Conv1D, embeddings).
        add: adds dW into an (m, n) matrix in place, or dW^T into an (n, m) one.
    """

    module: str
    kind: str
    m: int
    n: int
    weight_shape: tuple[int, ...]
    transposed: bool
    add: Callable[[torch.Tensor, bool], None]

    @property
    def square(self) -> bool:
        return self.m == self.n

    def laid_out_as(self, shape: Sequence[int]) -> bool | None:
        """Whether a weight of this shape stores dW's transpose; None where no layout fits."""
        if self.kind == "conv2d":
            return False if tuple(shape) == self.weight_shape else None
        if tuple(shape) == ((self.n, self.m) if self.transposed else (self.m, self.n)):
            return self.transposed
        if tuple(shape) == (self.m, self.n):
            return False
        # PEFT's configuration records fan_in_fan_out as its last module had it, so a model with
        # both Conv1D and Linear modules contradicts it for some: there the shape decides.
        if self.kind == "linear" and tuple(shape) == (self.n, self.m):
            return True
        return None

    def add_to(self, weight: torch.Tensor) -> None:
        """Add dW into the base weight, any of float32, bfloat16, float16 and float64, in place."""
        self.add(
            weight.view(self.n, self.m) if self.transposed else weight.view(self.m, self.n),
            self.transposed,
        )


def of_adapter(adapter: Adapter) -> list[Delta]:
    """The deltas of an adapter; its factors are read when they are added, not before."""

    def adder(module: str, scaling: float) -> Callable[[torch.Tensor, bool], None]:
        def add(matrix: torch.Tensor, transposed: bool) -> None:
            a, b = adapter.factors(module)
            # (B A)^T = A^T B^T: the same product with the factors' parts swapped.
            left, right = (a.mT, b.mT) if transposed else (b, a)
            add_product(matrix, left, right, scaling)

        return add

    return [
        Delta(
            module=slot.module,
            kind=slot.kind,
            m=slot.m,
            n=slot.n,
            weight_shape=tuple(slot.weight_shape),
            transposed=slot.transposed,
            add=adder(slot.module, slot.scaling),
        )
        for slot in adapter.layout.slots
    ]


def add_product(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """weight (m, n) += scaling * left (m, r) @ right (r, n), accumulated in float32 (float64 for a
    float64 weight), rounded once, without forming the product apart."""
    if weight.dtype == torch.float64:
        weight.addmm_(left.double(), right.double(), alpha=scaling)
        return
    from fastagg import ops

    coefficients = torch.full((1, left.shape[1]), scaling, dtype=torch.float64)
    ops.reconstruct_(weight.unsqueeze(0), right.unsqueeze(0), left.mT.unsqueeze(0), coefficients)


def oriented(
    deltas: Sequence[Delta], shapes: Sequence[tuple[int, ...]], *, client: str | None
) -> list[Delta]:
    """The deltas with `transposed` as the base weights of these shapes have it.

    A square weight does not tell how it lies. The configuration does, unless another module proves
    it wrong: then the nearest non-square module of the adapter, by name, decides.

    Raises:
        InvalidInput: a shape fits neither way, or nothing tells how a square weight lies.
    """
    found = [_laid_out(delta, shape, client=client) for delta, shape in zip(deltas, shapes, strict=True)]
    proofs = [
        (delta.module, lies)
        for delta, lies in zip(deltas, found, strict=True)
        if delta.kind == "linear" and not delta.square
    ]
    contradicted = any(
        lies != delta.transposed
        for delta, lies in zip(deltas, found, strict=True)
        if delta.kind == "linear" and not delta.square
    )
    placed = []
    for delta, lies in zip(deltas, found, strict=True):
        if contradicted and delta.square and delta.kind == "linear":
            lies = _nearest_proof(delta.module, proofs, client=client)
        placed.append(replace(delta, transposed=lies))
    return placed


def _laid_out(delta: Delta, shape: tuple[int, ...], *, client: str | None) -> bool:
    lies = delta.laid_out_as(shape)
    if lies is None:
        raise InvalidInput(
            "the delta weight does not have the shape of the base checkpoint's weight",
            client=client,
            module=delta.module,
            expected=f"{_by(shape)} as in the checkpoint",
            got=_by(delta.weight_shape),
            cure="Give the base model that the adapter was trained on; where the vocabulary was "
            "resized for training, resize and save the base model first",
        )
    return lies


def _nearest_proof(module: str, proofs: list[tuple[str, bool]], *, client: str | None) -> bool:
    def shared(other: str) -> int:
        pairs = zip(module.split("."), other.split("."), strict=False)
        return next((i for i, (x, y) in enumerate(pairs) if x != y), 0)

    nearest = max(shared(other) for other, _ in proofs)
    answers = {lies for other, lies in proofs if shared(other) == nearest}
    if len(answers) != 1:
        raise InvalidInput(
            "nothing tells whether this square weight is stored as (in, out) or (out, in)",
            client=client,
            module=module,
            field="fan_in_fan_out",
            cure="train the Conv1D and the Linear modules as two adapters and merge one after the other",
        )
    return answers.pop()


def check_mergeable(module: str, dtype: torch.dtype, *, client: str | None) -> None:
    """Refuse a base weight that is no floating-point matrix."""
    if dtype not in _MERGEABLE:
        raise InvalidInput(
            "the base weight is not floating point, so nothing can be added to it",
            client=client,
            module=module,
            expected="float32, bfloat16, float16 or float64",
            got=dtype_name(dtype),
            cure="merge into the unquantised checkpoint, then quantise",
        )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
