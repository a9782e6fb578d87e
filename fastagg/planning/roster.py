"""Who takes part in a round, and what all of them must agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, Slot, TensorSpan

__all__ = ["Float64Array", "Member", "Roster"]

Float64Array = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Member:
    """One client of a round: all that is known of it besides its numbers.

    Attributes:
        client: its id.
        weight: w_k as the client's update gave it.
        layout, config: of its adapter; its hand-out has the same.
        slot_weights: (J,) the method's weight of each of its modules, in the order of the slots.
        absent_weight: what the client counts for in modules that it does not have, where those
            count as zero.
    """

    client: str
    weight: float
    layout: Layout
    config: AdapterConfig
    slot_weights: Float64Array
    absent_weight: float

    @property
    def rank(self) -> int:
        """The largest rank among its modules."""
        return max(slot.rank for slot in self.layout.slots)

    @property
    def own_modules(self) -> frozenset[str]:
        """The names of its modules."""
        return frozenset(slot.module for slot in self.layout.slots)


@dataclass(frozen=True)
class ModuleSize:
    """What a module costs: dW is m x n, R_j = rank_sum rows are stacked, width is the largest rank of
    a client."""

    m: int
    n: int
    rank_sum: int
    width: int

    def with_slot(self, slot: Slot) -> ModuleSize:
        """The size once another client's slot is added."""
        return ModuleSize(
            slot.m, slot.n, self.rank_sum + slot.rank, max(self.width, slot.rank)
        )


@dataclass(frozen=True)
class ShapeSize:
    """The modules of one shape: how many, the largest R_j and the largest rank of a client."""

    count: int
    rank_sum: int
    width: int


class Roster:
    """The members of a round by id, the modules and whole tensors they brought, their base model.

    ``check`` refuses what does not fit and changes nothing; ``admit`` cannot fail. Both cost what
    the client's own modules do, however many are in the round.

    Attributes:
        nbytes: of all members' adapters, or of what is held in their place.
        largest: bytes of the largest of them.
    """

    def __init__(self, *, equal_ranks: bool = False, method: str = "") -> None:
        self.members: dict[str, Member] = {}
        self.slots: dict[str, tuple[Slot, str]] = {}
        self.whole: dict[str, tuple[TensorSpan, str]] = {}
        self.sizes: dict[str, ModuleSize] = {}
        self.nbytes = 0
        self.largest = 0
        self.equal_ranks = equal_ranks
        self.method = method
        self._base: tuple[str, str] | None = None
        self._changed: tuple[str | None, str] | None = None
        self._known: set[str] = set()
        self._shapes: dict[tuple[int, int], ShapeSize] = {}

    def __len__(self) -> int:
        return len(self.members)

    def sorted(self) -> list[Member]:
        """The members by id: the order that every sum is taken in."""
        return [self.members[client] for client in sorted(self.members)]

    def check(self, client: str, layout: Layout, config: AdapterConfig) -> None:
        """Whether a client fits to the others.

        Raises:
            InvalidInput: its id is taken, or its base model, modules or whole tensors are unlike.
        """
        if client in self.members:
            raise InvalidInput(
                "this client is in the round already",
                client=client,
                cure="Give each update its own client_id",
            )
        self.check_fit(client, layout, config)

    def check_fit(self, client: str, layout: Layout, config: AdapterConfig) -> None:
        """Whether an adapter fits to those of the members, whoever has it.

        Raises:
            InvalidInput: its base model, modules or whole tensors are unlike.
        """
        self._check_base(client, config)
        if layout.digest in self._known:
            return
        for slot in layout.slots:
            if slot.module in self.slots:
                self._check_slot(client, slot, *self.slots[slot.module])
        for span in layout.whole:
            if span.key in self.whole:
                self._check_whole(client, span, *self.whole[span.key])

    def admit(self, member: Member) -> None:
        """Enters a member that ``check`` has let pass."""
        grown = self._grown([member.layout])
        self._shapes = self._shapes_with(grown)
        self.sizes.update(grown)
        self.nbytes += member.layout.nbytes
        self.largest = max(self.largest, member.layout.nbytes)
        self.members[member.client] = member
        if member.config.base_model is not None and self._base is None:
            self._base = (member.config.base_model, member.client)
        if self._changed is None:
            self._changed = (member.config.changes_base, member.client)
        if member.layout.digest not in self._known:
            self._known.add(member.layout.digest)
            for slot in member.layout.slots:
                self.slots.setdefault(slot.module, (slot, member.client))
            for span in member.layout.whole:
                self.whole.setdefault(span.key, (span, member.client))

    def hold(self, layouts: Iterable[Layout]) -> None:
        """Counts the rows and bytes of these adapters, held in the place of the members' own.

        O(slots of all).
        """
        rows: Counter[str] = Counter()
        self.nbytes = 0
        for layout in layouts:
            self.nbytes += layout.nbytes
            for slot in layout.slots:
                rows[slot.module] += slot.rank
        sizes = {module: replace(size, rank_sum=rows[module]) for module, size in self.sizes.items()}
        self.sizes, self._shapes = {}, {}
        self._shapes = self._shapes_with(sizes)
        self.sizes = sizes

    def with_headers(self, clients: Iterable[tuple[str, Layout, AdapterConfig]]) -> Roster:
        """This roster with members of which only (id, layout, config) is known.

        Raises:
            InvalidInput: they do not fit together.
        """
        for client, layout, config in clients:
            self.admit_header(client, layout, config)
        return self

    def admit_header(self, client: str, layout: Layout, config: AdapterConfig) -> None:
        """Enters a member whose weight is not known, or does not matter.

        Raises:
            InvalidInput: it does not fit to the others.
        """
        self.check(client, layout, config)
        self.admit(Member(client, 0.0, layout, config, np.zeros(0), 0.0))

    def shapes_with(self, layouts: Iterable[Layout]) -> dict[tuple[int, int], ShapeSize]:
        """(m, n) -> the modules of that shape, once clients of these layouts are added."""
        return self._shapes_with(self._grown(layouts))

    def widths_with(self, layouts: Iterable[Layout]) -> dict[str, int]:
        """Module -> the largest rank of a client once clients of these layouts are added.

        Only of the modules that they have.
        """
        return {module: size.width for module, size in self._grown(layouts).items()}

    def whole_with(self, layouts: Iterable[Layout]) -> list[TensorSpan]:
        """The whole tensors once clients of these layouts are added."""
        spans = {key: span for key, (span, _) in self.whole.items()}
        for layout in layouts:
            spans.update({span.key: span for span in layout.whole})
        return list(spans.values())

    def _grown(self, layouts: Iterable[Layout]) -> dict[str, ModuleSize]:
        """The new sizes of the modules that these layouts have."""
        grown: dict[str, ModuleSize] = {}
        for layout in layouts:
            for slot in layout.slots:
                size = grown.get(slot.module) or self.sizes.get(slot.module)
                size = size or ModuleSize(slot.m, slot.n, 0, 0)
                grown[slot.module] = size.with_slot(slot)
        return grown

    def _shapes_with(self, grown: Mapping[str, ModuleSize]) -> dict[tuple[int, int], ShapeSize]:
        shapes = dict(self._shapes)
        for module, size in grown.items():
            known = shapes.get((size.m, size.n), ShapeSize(0, 0, 0))
            shapes[size.m, size.n] = ShapeSize(
                known.count + (module not in self.sizes),
                max(known.rank_sum, size.rank_sum),
                max(known.width, size.width),
            )
        return shapes

    @property
    def base_model(self) -> str | None:
        """The base model that the members name; None where none does."""
        return self._base[0] if self._base else None

    @property
    def changes_base(self) -> str | None:
        """What fixes the base weights that all members trained on, where it is not the base model
        alone; see :class:`fastagg.peft_format.config.AdapterConfig`."""
        return self._changed[0] if self._changed else None

    def _check_base(self, client: str, config: AdapterConfig) -> None:
        if self._base and config.base_model not in (None, self._base[0]):
            raise InvalidInput(
                "adapters of different base models cannot be aggregated",
                client=client,
                field="base_model_name_or_path",
                expected=f"{self._base[0]!r} as client {self._base[1]!r} has it",
                got=repr(config.base_model),
                cure="If both names mean one model, write the same name into their configurations",
            )
        if self._changed and config.changes_base != self._changed[0]:
            raise InvalidInput(
                "the initialisation changed the base weights, and not alike for all clients",
                client=client,
                field="init_lora_weights",
                expected=f"{self._changed[0] or 'an unchanged base'} as client "
                f"{self._changed[1]!r} has it",
                got=config.changes_base or "an unchanged base",
                cure="Convert the adapters to plain LoRA first: "
                "save_pretrained(path_initial_model_for_weight_conversion=...)",
            )

    def _check_slot(self, client: str, slot: Slot, known: Slot, owner: str) -> None:
        def refuse(problem: str, expected: object, got: object, cure: str) -> InvalidInput:
            return InvalidInput(
                problem,
                client=client,
                module=slot.module,
                expected=f"{expected} as client {owner!r} has it",
                got=got,
                cure=cure,
            )

        same_base = "Aggregate only adapters of one base model"
        if slot.kind != known.kind:
            raise refuse("not the same kind of module", known.kind, slot.kind, same_base)
        if (slot.m, slot.n) == (known.m, known.n) and slot.transposed != known.transposed:
            raise refuse(
                "fan_in_fan_out is not the same",
                known.transposed,
                slot.transposed,
                "Set fan_in_fan_out as the base model stores its weights",
            )
        if slot.weight_shape != known.weight_shape:
            raise refuse(
                "the module has another shape",
                "x".join(map(str, known.weight_shape)),
                "x".join(map(str, slot.weight_shape)),
                same_base,
            )
        if self.equal_ranks and slot.rank != known.rank:
            raise refuse(
                f"{self.method} averages the factors and cannot mix ranks",
                f"rank {known.rank}",
                f"rank {slot.rank}",
                "Use method zeropad, which pads the smaller ranks, or flexlora or flora, "
                "which are exact",
            )

    def _check_whole(self, client: str, span: TensorSpan, known: TensorSpan, owner: str) -> None:
        if span.shape != known.shape:
            raise InvalidInput(
                "the whole tensor has another shape",
                client=client,
                module=span.parameter,
                field=span.key,
                expected=f"{'x'.join(map(str, known.shape))} as client {owner!r} has it",
                got="x".join(map(str, span.shape)),
                cure="Aggregate only adapters of one base model",
            )
