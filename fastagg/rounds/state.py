"""A round in progress as tensors and text, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastagg.accumulators import DenseAccumulator, MeanAccumulator, StackAccumulator
from fastagg.accumulators.condensed import Condensed, condensed_layout, name_of
from fastagg.accumulators.means import FactorSums
from fastagg.accumulators.weights import WeightUnit
from fastagg.accumulators.whole import WholeSums, elements
from fastagg.adapter import Adapter
from fastagg.dtypes import dtype_name
from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, TensorSpan
from fastagg.planning.plan import Bucket, WeightTotals
from fastagg.planning.roster import Float64Array, Member, Roster
from fastagg.rounds.memory_plan import Accumulator, MemoryPlan

__all__ = ["dump", "load"]

# The one text of a state: everything that is no tensor, as JSON.
HEADER = "fastagg"
VERSION = 2
# A state of version 1 holds nothing that was condensed.
_READABLE = (1, VERSION)

State = dict[str, "torch.Tensor | str"]


def dump(method: str, missing: str, roster: Roster, accumulator: Accumulator) -> State:
    """The state of a round on the host; sums are copied, the clients' buffers there are not."""
    tensors: dict[str, torch.Tensor] = {}
    layouts: dict[str, Any] = {}
    members = []
    for number, member in enumerate(roster.members.values()):
        if member.layout.digest not in layouts:
            layouts[member.layout.digest] = _layout_fields(member)
        members.append(
            {
                "client": member.client,
                "weight": member.weight,
                "absent_weight": member.absent_weight,
                "slot_weights": member.slot_weights.tolist(),
                "layout": member.layout.digest,
            }
        )
        if isinstance(accumulator, StackAccumulator) and member.client in accumulator.flats:
            tensors[f"flat.{number}"] = accumulator.flats[member.client].cpu()
    header = {
        "version": VERSION,
        "method": method,
        "missing": missing,
        "accumulator": accumulator.kind,
        "layouts": layouts,
        "members": members,
    }
    if isinstance(accumulator, StackAccumulator):
        header["condensed"] = [_condensed_fields(group) for group in accumulator.condensed]
        for number, group in enumerate(accumulator.condensed):
            tensors[f"condensed.{number}"] = group.flat.cpu()
    else:
        header["sums"] = _dump_sums(accumulator, tensors)
    return {HEADER: json.dumps(header), **tensors}


def load(
    state: Mapping[str, Any],
    plan: MemoryPlan,
    missing: str,
    roster: Roster,
    device: torch.device,
) -> Accumulator:
    """Fills an empty roster and returns the accumulator of a state.

    Raises:
        InvalidInput: not a state, damaged, of another method or ``missing``, or of an accumulator
            that the plan excludes.
        MemoryBudgetExceeded: it does not fit.
    """
    try:
        header = json.loads(state[HEADER])
        if header["version"] not in _READABLE:
            raise _damaged("it is of another version", VERSION, header["version"])
        for field, mine in (("method", plan.method.name), ("missing", missing)):
            if header[field] != mine:
                raise _damaged(f"it was saved with another {field}", mine, header[field])
        kind = header["accumulator"]
        if not plan.allows(kind):
            allowed = [name for name in plan.method.accumulators if plan.allows(name)]
            raise _damaged("it was saved with another accumulator", " or ".join(allowed), kind)
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        plan.check_held(sum(value.nbytes for value in tensors))
        members = _members(header, roster)
        if kind == "stack":
            groups = _load_condensed(header.get("condensed", []), state, roster, device)
            return _load_stack(state, members, groups, device)
        sums: DenseAccumulator | MeanAccumulator
        if kind == "dense":
            sums = DenseAccumulator(device, missing, plan.fold_limit)
        else:
            sums = MeanAccumulator(device, missing, plan.fold_limit)
        _load_sums(header["sums"], state, sums, device)
        _check_sums(sums, roster)
        return sums
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _check_sums(sums: DenseAccumulator | MeanAccumulator, roster: Roster) -> None:
    """Whether the sums are those of the clients' modules and tensors."""
    shapes = {
        module: (bucket.m, bucket.n) for bucket in sums.blocks.buckets for module in bucket.modules
    }
    counts = {key: sum_.numel() for key, sum_ in sums.whole.sums.items()}
    if (
        shapes != {module: (size.m, size.n) for module, size in roster.sizes.items()}
        or sums.totals.total.keys() != shapes.keys()
        or counts != {key: span.count for key, (span, _) in roster.whole.items()}
    ):
        raise _damaged("its sums are not those of its clients' modules")


def _layout_fields(member: Member) -> dict[str, Any]:
    return {
        "config": dict(member.config.raw),
        "nbytes": member.layout.nbytes,
        "tensors": [
            [span.source, span.offset, list(span.shape), dtype_name(span.dtype)]
            for span in member.layout.tensors
        ],
    }


def _members(header: Mapping[str, Any], roster: Roster) -> list[Member]:
    known: dict[str, tuple[Layout, AdapterConfig]] = {}
    for digest, fields in header["layouts"].items():
        config = AdapterConfig.from_dict(fields["config"])
        spans = [
            TensorSpan(source, offset, tuple(shape), getattr(torch, dtype), source)
            for source, offset, shape, dtype in fields["tensors"]
        ]
        if any(span.offset < 0 or span.offset + span.nbytes > fields["nbytes"] for span in spans):
            raise _damaged("a tensor lies outside its buffer")
        known[digest] = (Layout.of(spans, config, fields["nbytes"]), config)
    members = []
    for fields in header["members"]:
        layout, config = known[fields["layout"]]
        weights = np.array(fields["slot_weights"], dtype=np.float64)
        if weights.shape != (len(layout.slots),) or not bool((weights >= 0).all()):
            raise _damaged(f"the weights of client {fields['client']!r} do not fit its modules")
        member = Member(
            fields["client"],
            float(fields["weight"]),
            layout,
            config,
            weights,
            float(fields["absent_weight"]),
        )
        roster.check(member.client, layout, config)
        roster.admit(member)
        members.append(member)
    return members


def _load_stack(
    state: Mapping[str, Any], members: list[Member], groups: list[Condensed], device: torch.device
) -> StackAccumulator:
    stack = StackAccumulator(device, groups)
    condensed = {client for group in groups for client in group.clients}
    for number, member in enumerate(members):
        if member.client in condensed:
            continue
        flat = _tensor(state, f"flat.{number}", (member.layout.nbytes,), torch.uint8)
        adapter = Adapter.from_flat(flat.cpu(), member.layout, member.config, name=member.client)
        adapter.check_finite(member.client)
        stack.add([member], [flat])
    return stack


def _condensed_fields(group: Condensed) -> dict[str, Any]:
    return {
        "clients": list(group.clients),
        "ranks": {slot.module: slot.rank for slot in group.layout.slots},
        "weights": group.slot_weights.tolist(),
        "errors": group.errors.tolist(),
        "whole": [span.key for span in group.layout.whole],
        "whole_weights": group.whole_weights.tolist(),
    }


def _load_condensed(
    groups: list[Any], state: Mapping[str, Any], roster: Roster, device: torch.device
) -> list[Condensed]:
    loaded: list[Condensed] = []
    known: set[str] = set()
    for number, fields in enumerate(groups):
        clients = tuple(fields["clients"])
        layout = condensed_layout(roster, fields["ranks"], fields["whole"])
        own = [roster.members[client].layout for client in clients]
        modules = {slot.module for each in own for slot in each.slots}
        keys = {span.key for each in own for span in each.whole}
        if modules != fields["ranks"].keys() or keys != set(fields["whole"]):
            raise _damaged(f"what is condensed has not the modules of {clients[0]!r} and its like")
        if known & set(clients) or list(clients) != sorted(set(clients)):
            raise _damaged(f"a client is condensed twice, {clients[0]!r} or one beside it")
        known |= set(clients)
        name = f"condensed.{number}"
        flat = _tensor(state, name, (layout.nbytes,), torch.uint8).to(device, copy=True)
        for span in layout.tensors:
            _finite(elements(flat, span, 0, span.count), f"{name}, {span.key},")
        loaded.append(
            Condensed(
                client=name_of(clients),
                layout=layout,
                flat=flat,
                slot_weights=_numbers(fields["weights"], len(layout.slots), "weights"),
                whole_weights=_numbers(fields["whole_weights"], len(layout.whole), "weights"),
                clients=clients,
                errors=_numbers(fields["errors"], len(layout.slots), "errors"),
            )
        )
    return loaded


def _numbers(values: Any, count: int, what: str) -> Float64Array:
    """(count,) float64, finite and not negative."""
    found = np.array(values, dtype=np.float64)
    if found.shape != (count,) or not bool(((found >= 0) & np.isfinite(found)).all()):
        raise _damaged(f"the {what} of what is condensed are not {count} numbers from 0")
    return found


def _dump_sums(
    sums: DenseAccumulator | MeanAccumulator, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "blocks": [[bucket.m, bucket.n, list(bucket.modules)] for bucket in sums.blocks.buckets],
        "totals": sums.totals.total,
        "absent": sums.totals.absent,
        "whole": {
            key: [f"whole.{number}", sums.whole.totals[key]]
            for number, key in enumerate(sums.whole.sums)
        },
        "whole_unit": sums.whole.unit.exponent,
    }
    for key, (name, _) in fields["whole"].items():
        tensors[name] = _on_host(sums.whole.sums[key])
    if isinstance(sums, DenseAccumulator):
        fields["unit"] = sums.unit.exponent
        fields["discarded"] = sums.discarded
        for number, dense in enumerate(sums.blocks.sums):
            tensors[f"dense.{number}"] = _on_host(dense)
    else:
        fields["ranks"] = [block.ranks for block in sums.blocks.sums]
        for number, block in enumerate(sums.blocks.sums):
            tensors[f"means.{number}.a"] = _on_host(block.a)
            tensors[f"means.{number}.bt"] = _on_host(block.bt)
    return fields


def _on_host(sums: torch.Tensor) -> torch.Tensor:
    """A copy: what is added later is not in it."""
    return sums.to("cpu", copy=True)


def _load_sums(
    fields: Mapping[str, Any],
    state: Mapping[str, Any],
    sums: DenseAccumulator | MeanAccumulator,
    device: torch.device,
) -> None:
    for number, (m, n, modules) in enumerate(fields["blocks"]):
        bucket = Bucket(m, n, tuple(modules))
        count = len(bucket.modules)
        if isinstance(sums, DenseAccumulator):
            dense = _tensor(state, f"dense.{number}", (count, m, n), torch.float32)
            sums.blocks.append(bucket, dense.to(device, copy=True))
        else:
            rank = state[f"means.{number}.a"].shape[1]
            a = _tensor(state, f"means.{number}.a", (count, rank, n), torch.float64)
            bt = _tensor(state, f"means.{number}.bt", (count, rank, m), torch.float64)
            ranks = [int(value) for value in fields["ranks"][number]]
            if len(ranks) != count or max(ranks, default=0) > rank:
                raise _damaged("the ranks of its sums do not fit them")
            block = FactorSums(a.to(device, copy=True), bt.to(device, copy=True), ranks)
            sums.blocks.append(bucket, block)
    if isinstance(sums, DenseAccumulator):
        sums.unit = WeightUnit(fields["unit"])
        discarded: Mapping[str, float] = fields.get("discarded", {})
        values = _numbers(list(discarded.values()), len(discarded), "errors")
        sums.discarded = dict(zip(discarded, values.tolist(), strict=True))
    sums.totals = WeightTotals(sums.totals.missing)
    sums.totals.total = {str(module): float(total) for module, total in fields["totals"].items()}
    sums.totals.absent = float(fields["absent"])
    whole = WholeSums(device)
    whole.unit = WeightUnit(fields["whole_unit"])
    for key, (name, total) in fields["whole"].items():
        whole.sums[key] = _finite(state[name], name).to(device, copy=True)
        whole.totals[key] = float(total)
    sums.whole = whole


def _tensor(
    state: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    value = state[name]
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else value
        raise _damaged(f"{name} is not what it should be", f"{shape} {dtype}", found)
    return _finite(value, name)


def _finite(value: torch.Tensor, name: str) -> torch.Tensor:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise _damaged(f"{name} holds NaN or infinity")
    return value


def _damaged(problem: str, expected: object = None, got: object = None) -> InvalidInput:
    return InvalidInput(
        f"this state cannot be continued: {problem}",
        field="state_dict",
        expected=expected,
        got=got,
        cure="Load what Aggregator.state_dict() gave, with the same options",
    )
