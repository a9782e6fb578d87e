"""What the rounds so far have come to, and what the clients get of it.

Methods whose clients continue (flexlora, fedit, zeropad, hetlora) hand each client an adapter of its
own; a method whose clients merge (flora) hands all of them one, which they add to their base weights.

With a server optimiser the server keeps dense numbers, m n float32 for each module: G, the sum of all
changes, where clients continue, and the optimiser's moments. The pseudo-gradient is

    D = dW - G    where clients continue: their average is dW, and they began with G
    D = dW        where clients merge: G is in their base weights already

and the change that the optimiser makes of it is dense. Where clients continue, each gets the best
approximation of the new G of its rank (Eckart and Young), for the averaging methods too, whose mean
factors are no more once they went through an optimiser. Where they merge, the change itself is
handed out, as an adapter of rank min(m, n) with the identity for one of its factors: exact, and as
large as the weights that it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fastagg import Adapter, Aggregate, truncated_svd
from fastagg.errors import InvalidInput
from fastagg.federated.server.server_optimisers import ServerOptimiser
from fastagg.peft_format.layout import Slot

__all__ = ["Rules", "ServerModel"]

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (R, n) and B (m, R) of one module; an adapter of rank r <= R takes the first rows and columns."""


@dataclass(frozen=True, eq=False)
class Rules:
    """How a round changes the server's model; the same in every round.

    Attributes:
        optimiser: the server's.
        merging: the clients merge what they are handed.
        slots: the modules of all clients: their names and shapes.
        device: where the dense numbers are kept and worked on.
        route, seed: of the decomposition of G.
        dtype: of what is handed out; None is each client's own.
    """

    optimiser: ServerOptimiser
    merging: bool
    slots: Mapping[str, Slot]
    device: torch.device
    route: str
    seed: int
    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class ServerModel:
    """The model after a round. It never changes: a round that fails half way leaves nothing behind.

    Attributes:
        adapters: where clients continue, one for each kind of client, which is its fresh adapter
            until the first round is over; where they merge, the last round's, none before.
        totals: module -> G (m, n) float32.
        moments: module -> what the optimiser remembers of it.
    """

    adapters: tuple[Adapter, ...]
    totals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def after(self, aggregate: Aggregate, rules: Rules) -> ServerModel:
        """The model after one more round.

        Modules that no client of the round has stay as they are.

        Raises:
            InvalidInput: numbers that are not finite, or do not fit into a client's dtype.
            MemoryBudgetExceeded: a hand-out does not fit into the memory that it may take.
        """
        if rules.optimiser.dense:
            return self._stepped(aggregate, rules)
        if rules.merging:
            return ServerModel((aggregate.stacked(),))
        return ServerModel(tuple(aggregate.adapter(like=adapter) for adapter in self.adapters))

    @torch.no_grad()
    def _stepped(self, aggregate: Aggregate, rules: Rules) -> ServerModel:
        totals, moments = dict(self.totals), dict(self.moments)
        factors: dict[str, Factors] = {}
        for module in aggregate.modules:
            slot = rules.slots[module]
            total = totals.get(module)
            if total is None:
                total = torch.zeros(slot.m, slot.n, dtype=torch.float32, device=rules.device)
            gradient = -total
            aggregate.add_delta(module, gradient)
            change, moments[module] = rules.optimiser.step(gradient, moments.get(module, {}))
            if rules.merging:
                factors[module] = _exact(_finite(change, module))
            else:
                totals[module] = _finite(total + change, module)
                factors[module] = self._best(module, totals[module], rules)
        whole = _averages(aggregate)
        if rules.merging:
            adapters: Iterable[Adapter] = (_at_full_rank(aggregate.stacked()),)
        else:
            adapters = self.adapters
        return ServerModel(
            tuple(_with_numbers(adapter, factors, whole, rules.dtype) for adapter in adapters),
            totals,
            moments,
        )

    def _best(self, module: str, total: torch.Tensor, rules: Rules) -> Factors:
        """The truncated SVD of G at the largest rank that a client has: V^T and U S."""
        slots = [adapter.layout.by_module.get(module) for adapter in self.adapters]
        rank = max(slot.rank for slot in slots if slot is not None)
        a, b = _exact(total)
        u, s, vt, _ = truncated_svd(a, b, rank, route=rules.route, seed=rules.seed)
        return vt, u * s

    def tensors(self) -> dict[str, torch.Tensor]:
        """All numbers, on the host, by name; :meth:`with_tensors` takes them back."""
        found = {
            f"adapter.{number}/{key}": tensor
            for number, adapter in enumerate(self.adapters)
            for key, tensor in adapter.state_dict().items()
        }
        found.update({f"total/{module}": total.cpu() for module, total in self.totals.items()})
        for module, moments in self.moments.items():
            found.update({f"moment.{name}/{module}": each.cpu() for name, each in moments.items()})
        return found

    @classmethod
    def with_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        configs: Iterable[Mapping[str, object]],
        rules: Rules,
    ) -> ServerModel:
        """The model of which these are the numbers.

        Args:
            configs: the fields of each adapter's configuration.

        Raises:
            InvalidInput: the numbers do not make such adapters, or are not finite.
        """
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            states.setdefault(kind, {})[key] = tensor
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for kind, found in states.items():
            if kind.startswith("moment."):
                for module, tensor in found.items():
                    moment = moments.setdefault(module, {})
                    moment[kind.removeprefix("moment.")] = _dense(tensor, module, rules)
        adapters = tuple(
            Adapter(states.get(f"adapter.{number}", {}), config)
            for number, config in enumerate(configs)
        )
        for adapter in adapters:
            adapter.check_finite()
        totals = {
            module: _dense(total, module, rules)
            for module, total in states.get("total", {}).items()
        }
        return cls(adapters, totals, moments)


def _dense(matrix: torch.Tensor, module: str, rules: Rules) -> torch.Tensor:
    """A loaded G or moment, on the device."""
    slot = rules.slots[module]
    if matrix.shape != (slot.m, slot.n) or matrix.dtype != torch.float32:
        raise InvalidInput(
            "not a sum of this module's changes",
            module=module,
            expected=f"{slot.m}x{slot.n} float32",
            got=f"{'x'.join(map(str, matrix.shape))} {matrix.dtype}",
        )
    return _finite(matrix, module).to(rules.device)


def _exact(matrix: torch.Tensor) -> Factors:
    """A matrix as factors of the rank min(m, n): itself and the identity."""
    m, n = matrix.shape
    identity = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if m <= n else (identity, matrix)


def _at_full_rank(stack: Adapter) -> Adapter:
    """An adapter for the modules of a stack, of rank min(m, n) and scaling 1, its factors zero."""
    slots = stack.layout.slots
    ranks = {slot.module: min(slot.m, slot.n) for slot in slots}
    config = stack.config.with_ranks(
        ranks, dict.fromkeys(ranks, 1.0), own_modules=stack.modules
    )
    state = stack.state_dict()
    for slot in slots:
        rank = ranks[slot.module]
        a_shape, b_shape = slot.factor_shapes(rank)
        state[slot.a.source] = torch.zeros(a_shape, dtype=slot.a.dtype)
        state[slot.b.source] = torch.zeros(b_shape, dtype=slot.b.dtype)
    return Adapter(state, config, name=stack.name)


def _with_numbers(
    adapter: Adapter,
    factors: Mapping[str, Factors],
    whole: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> Adapter:
    """An adapter with the factors of the modules, at its own ranks and scalings, and whole tensors.

    Raises:
        InvalidInput: a number does not fit into the adapter's dtype.
    """
    state = {key: tensor.to(dtype or tensor.dtype) for key, tensor in adapter.state_dict().items()}
    numbers = {span: whole[span.parameter] for span in adapter.layout.whole if span.parameter in whole}
    for slot in adapter.layout.slots:
        if slot.module in factors:
            a, b = factors[slot.module]
            numbers[slot.a] = a[: slot.rank]
            numbers[slot.b] = b[:, : slot.rank] / slot.scaling
    for span, values in numbers.items():
        cast = values.reshape(span.shape).to("cpu", state[span.source].dtype)
        if not bool(torch.isfinite(cast).all()):
            raise InvalidInput(
                f"the hand-out does not fit into {cast.dtype}",
                client=adapter.name,
                field=span.source,
                cure="Aggregate with dtype=torch.bfloat16 or torch.float32",
            )
        state[span.source] = cast
    return Adapter(state, adapter.config, name=adapter.name)


def _averages(aggregate: Aggregate) -> dict[str, torch.Tensor]:
    """The averages of the tensors that are no factors, by parameter; no optimiser changes them."""
    change = aggregate.change()
    return {**change.whole, **change.base}


def _finite(matrix: torch.Tensor, module: str) -> torch.Tensor:
    """The matrix, of which no entry and no singular value leaves the range of float32."""
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if not norm <= torch.finfo(torch.float32).max:
        raise InvalidInput(
            "the server's step leaves the range of float32",
            module=module,
            expected="finite values",
            cure="Lower the server's learning rate, or leave out clients whose factors are that large",
        )
    return matrix
