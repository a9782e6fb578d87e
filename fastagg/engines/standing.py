"""Where an engine's clients stand between rounds: immutable, so that a round changes all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.server.registry import kind_digest

__all__ = ["Standing", "alike"]


@dataclass(frozen=True, eq=False)
class Standing:
    """The clients after so many rounds.

    Attributes:
        finished: rounds.
        adapters: one for each kind of client: those whose adapters differ in their numbers alone.
        place: client -> the place of its kind among ``adapters``.
        stacks: what the clients merge, one a finished round, where they do.
        merged_through: client -> the last round whose stack it has surely merged.
    """

    finished: int = 0
    adapters: tuple[Adapter, ...] = ()
    place: Mapping[str, int] = field(default_factory=dict)
    stacks: tuple[Adapter, ...] = ()
    merged_through: Mapping[str, int] = field(default_factory=dict)

    def __contains__(self, client: object) -> bool:
        return client in self.place

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients, sorted."""
        return tuple(sorted(self.place))

    def adapter(self, client: str) -> Adapter:
        """The adapter of a client, shared with all of its kind.

        Raises:
            InvalidInput: no such client.
        """
        if client not in self.place:
            raise InvalidInput(
                "no such client",
                client=str(client),
                expected=f"one of {len(self.place)}: {', '.join(self.clients[:5])}",
                cure="Enrol it, or wait for its first answer",
            )
        return self.adapters[self.place[client]]

    def without(self, client: str) -> dict[str, Adapter]:
        """The adapters of the clients other than this one, each kind's under one client's name."""
        kinds = {kind: name for name, kind in self.place.items() if name != client}
        return {name: self.adapters[kind] for kind, name in kinds.items()}

    def missed(self, client: str) -> tuple[tuple[int, Adapter], ...]:
        """(round, stack) of the rounds that a client may not have merged yet, the oldest first."""
        through = self.merged_through.get(client, 0)
        return tuple(enumerate(self.stacks[through:], start=through + 1))

    def has_like(self, adapter: Adapter) -> bool:
        """Whether some client's adapter differs from this one in its numbers alone."""
        return any(alike(own, adapter) for own in self.adapters)

    def is_like(self, client: str, adapter: Adapter) -> bool:
        """Whether the client is known with such an adapter."""
        return client in self.place and alike(self.adapter(client), adapter)

    def with_client(self, client: str, adapter: Adapter) -> Standing:
        """With one more client, or another kind of adapter for one: this one, unless there is one of
        that kind already. Adapters that no client has any more are dropped."""
        adapters = [*self.adapters, adapter]
        kind = next(number for number, own in enumerate(adapters) if alike(own, adapter))
        place = {**self.place, client: kind}
        used = sorted(set(place.values()))
        return replace(
            self,
            adapters=tuple(adapters[number] for number in used),
            place={name: used.index(number) for name, number in place.items()},
        )

    def with_adapters(self, adapters: Sequence[Adapter]) -> Standing:
        """After one more round, which has made these of the adapters."""
        return replace(self, finished=self.finished + 1, adapters=tuple(adapters))

    def with_merged(self, client: str, round: int) -> Standing:
        """With a client that has merged the stacks up to this round's."""
        through = min(max(round, 0), self.finished)
        return replace(self, merged_through={**self.merged_through, client: through})

    def merged(self, participants: Iterable[str], stack: Adapter) -> Standing:
        """After one more round of clients that had merged all stacks before this one."""
        through = {**self.merged_through, **dict.fromkeys(participants, self.finished)}
        return replace(
            self, finished=self.finished + 1, stacks=(*self.stacks, stack), merged_through=through
        )


def alike(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters differ in their numbers alone."""
    if one.layout.digest == other.layout.digest and one.config == other.config:
        return True
    return kind_digest(one) == kind_digest(other)
