"""Which adapters are handed out: their configuration, their layout, and who gets them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastagg.errors import InvalidInput
from fastagg.handouts.choices import Handout
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, TensorSpan, promoted
from fastagg.planning.roster import Member, Roster

__all__ = [
    "Target",
    "all_ranks",
    "check_ranks",
    "for_client",
    "for_rank",
    "for_stack",
    "per_signature",
    "targets_for",
]


@dataclass(frozen=True, eq=False)
class Target:
    """One adapter to be written.

    Attributes:
        name: of its folder.
        layout, config: of the adapter.
        clients: those that get it.
    """

    name: str
    layout: Layout
    config: AdapterConfig
    clients: tuple[str, ...] = ()


def targets_for(
    roster: Roster, handout: Handout, ranks: Iterable[int] | None, dtype: torch.dtype | None
) -> list[Target]:
    """What a round's folder holds.

    Args:
        ranks: these instead of the clients' own; None: the clients' own, or the stack where that is
            what the method hands out.

    Raises:
        InvalidInput: ranks that the method does not hand out.
    """
    if ranks is not None:
        listed = check_ranks(ranks)
        largest = max(member.rank for member in roster.members.values())
        for rank in listed:
            handout.check_rank(rank, largest)
        return all_ranks(roster, listed, dtype)
    if not handout.ranked:
        return [for_stack(roster, dtype)]
    return per_signature(roster, dtype)


def for_client(
    client: str, layout: Layout, config: AdapterConfig, dtype: torch.dtype | None
) -> Target:
    """The client's own keys, ranks, scalings and configuration; its dtypes unless one is given."""
    if dtype is not None:
        layout = _renamed(_fresh(layout, dtype), layout)
    return Target(client, layout, config, (client,))


def per_signature(roster: Roster, dtype: torch.dtype | None) -> list[Target]:
    """One target for all clients that agree on modules, ranks, scalings and dtypes.

    Keys are PEFT's, whatever prefix the client's own had; the configuration is that of the first
    client by id.
    """
    groups: dict[object, list[Member]] = {}
    for member in roster.sorted():
        groups.setdefault(_signature(member, dtype), []).append(member)
    targets: list[Target] = []
    for members in groups.values():
        ranks = {slot.rank for slot in members[0].layout.slots}
        name = _unused("rank-" + "-".join(map(str, sorted({min(ranks), max(ranks)}))), targets)
        clients = tuple(member.client for member in members)
        layout = _fresh(members[0].layout, dtype)
        targets.append(Target(name, layout, members[0].config, clients))
    return targets


def for_rank(roster: Roster, rank: int, dtype: torch.dtype | None) -> Target:
    """One rank in all modules of the round.

    A module's scaling is that of its clients where they agree on it, and 1 where they do not. The
    dtype is that of all clients' tensors where they agree, float32 where they do not.
    """
    scalings: dict[str, set[float]] = {}
    for layout in {member.layout for member in roster.sorted()}:
        for slot in layout.slots:
            scalings.setdefault(slot.module, set()).add(slot.scaling)
    ranks = dict.fromkeys(roster.slots, rank)
    common = {module: found.pop() if len(found) == 1 else 1.0 for module, found in scalings.items()}
    return _of_all(roster, f"rank-{rank}", ranks, common, dtype or _common_dtype(roster))


def for_stack(roster: Roster, dtype: torch.dtype | None) -> Target:
    """The stack of all clients: the ranks of their modules added up, scaling 1, float32."""
    ranks = {module: size.rank_sum for module, size in roster.sizes.items()}
    scalings = dict.fromkeys(ranks, 1.0)
    target = _of_all(roster, "stacked", ranks, scalings, dtype or torch.float32)
    return replace(target, clients=tuple(member.client for member in roster.sorted()))


def all_ranks(roster: Roster, ranks: Sequence[int], dtype: torch.dtype | None) -> list[Target]:
    """A target for each rank listed.

    A client gets the largest listed rank that is not above its own largest, else the smallest.
    """
    listed = sorted(set(check_ranks(ranks)))
    given: dict[int, list[str]] = {rank: [] for rank in listed}
    for member in roster.sorted():
        fitting = [rank for rank in listed if rank <= member.rank]
        given[fitting[-1] if fitting else listed[0]].append(member.client)
    return [
        replace(for_rank(roster, rank, dtype), clients=tuple(clients))
        for rank, clients in given.items()
    ]


def check_ranks(ranks: Iterable[object]) -> list[int]:
    """Ranks as a user gave them.

    Raises:
        InvalidInput: none, or one that is no integer above 0.
    """
    listed: list[int] = []
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise InvalidInput(
                "not a rank", field="ranks", expected="integers >= 1", got=repr(rank)
            )
        listed.append(rank)
    if not listed:
        raise InvalidInput(
            "no rank is listed",
            field="ranks",
            cure="Leave ranks out to hand each client its own",
        )
    return listed


def _of_all(
    roster: Roster,
    name: str,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    dtype: torch.dtype,
) -> Target:
    members = roster.sorted()
    slots = [slot for slot, _ in roster.slots.values()]
    whole = [span for span, _ in roster.whole.values()]
    layout = Layout.fresh(slots, ranks, scalings, dtype=dtype, whole=whole)
    first = members[0]
    shared = _shared_config(roster)
    config = shared.with_ranks(ranks, scalings, own_modules=first.own_modules)
    return Target(name, layout, config)


def _shared_config(roster: Roster) -> AdapterConfig:
    """The first member's configuration, naming the base model and all modules_to_save."""
    members = roster.sorted()
    raw = dict(members[0].config.raw)
    configs = list({id(member.config): member.config for member in members}.values())
    saved = {name for config in configs for name in config.raw.get("modules_to_save") or ()}
    if saved:
        raw["modules_to_save"] = sorted(saved)
    if roster.base_model is not None:
        raw["base_model_name_or_path"] = roster.base_model
    biased = [bias for config in configs if (bias := config.raw.get("bias", "none")) != "none"]
    if biased:
        raw["bias"] = biased[0]
    return AdapterConfig.from_dict(raw, client=members[0].client)


def _common_dtype(roster: Roster) -> torch.dtype:
    return promoted(member.layout.dtype for member in roster.members.values())


def _fresh(layout: Layout, dtype: torch.dtype | None) -> Layout:
    slots = layout.slots
    return Layout.fresh(
        slots,
        {slot.module: slot.rank for slot in slots},
        {slot.module: slot.scaling for slot in slots},
        dtype=dtype,
        whole=layout.whole,
    )


def _renamed(layout: Layout, own: Layout) -> Layout:
    """The layout under the keys that the client itself uses."""
    names = {span.key: span.source for span in own.tensors}

    def renamed(span: TensorSpan) -> TensorSpan:
        return replace(span, source=names[span.key])

    slots = [replace(slot, a=renamed(slot.a), b=renamed(slot.b)) for slot in layout.slots]
    whole = [renamed(span) for span in layout.whole]
    return Layout(slots, whole, layout.nbytes, f"{layout.digest}:{own.digest}")


def _signature(member: Member, dtype: torch.dtype | None) -> object:
    slots = tuple(
        (slot.module, slot.rank, slot.scaling, dtype or slot.a.dtype, dtype or slot.b.dtype)
        for slot in member.layout.slots
    )
    return slots, tuple((span.key, dtype or span.dtype) for span in member.layout.whole)


def _unused(name: str, targets: Sequence[Target]) -> str:
    taken = {target.name for target in targets}
    version, candidate = 1, name
    while candidate in taken:
        version += 1
        candidate = f"{name}-v{version}"
    return candidate
