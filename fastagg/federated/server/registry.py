"""The clients that a server knows, and what an adapter of each looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from fastagg import Adapter, Aggregator
from fastagg.errors import InvalidInput
from fastagg.method import Method
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, Slot

__all__ = ["Registry", "check_alike", "kind_digest"]


class Registry:
    """The clients by name, sorted into kinds: clients whose adapters differ in their numbers alone.

    Args:
        clients: name -> a fresh adapter of the client's own configuration.

    Attributes:
        kinds: the adapters of the first client of each kind.
        kind_of: name -> a digest of all that makes the kind.
        slots: module -> the module, as the first kind that has it.

    Raises:
        InvalidInput: no client, an adapter that is none, or clients that the method cannot
            aggregate together.
    """

    def __init__(self, clients: Mapping[str, Adapter], method: Method) -> None:
        for name, adapter in clients.items():
            if not isinstance(name, str) or not name.strip() or not isinstance(adapter, Adapter):
                raise InvalidInput(
                    "a client is registered by its name and a fresh adapter",
                    client=str(name),
                    field="clients",
                    expected="a text that is not empty, and an Adapter",
                    got=f"{type(name).__name__} and {type(adapter).__name__}",
                )
        if not clients:
            raise InvalidInput("a server needs clients", field="clients", got="none")
        self.kind_of = {name: kind_digest(adapter) for name, adapter in sorted(clients.items())}
        first: dict[str, Adapter] = {}
        for name, kind in self.kind_of.items():
            first.setdefault(kind, clients[name])
        self.kinds = tuple(first.values())
        self._place = {kind: place for place, kind in enumerate(first)}
        self.slots: Mapping[str, Slot] = {
            slot.module: slot for adapter in reversed(self.kinds) for slot in adapter.layout.slots
        }
        # Together they may be more than fits into the memory of a round; whether they fit to each
        # other does not depend on that.
        Aggregator(method).plan_for(self.headers(self.kind_of))

    def __len__(self) -> int:
        return len(self.kind_of)

    def __contains__(self, client: object) -> bool:
        return client in self.kind_of

    def place(self, client: str) -> int:
        """The place of the client's kind among ``kinds``.

        Raises:
            InvalidInput: no such client.
        """
        self.check_known(client)
        return self._place[self.kind_of[client]]

    def check_known(self, client: str) -> None:
        """Raises InvalidInput where there is no such client."""
        if client not in self.kind_of:
            raise InvalidInput(
                "the server does not know this client",
                client=str(client),
                expected=f"one of {len(self)}, such as {next(iter(self.kind_of))!r}",
                cure="Name all clients when the server is made",
            )

    def headers(self, clients: Iterable[str]) -> Iterator[tuple[str, Layout, AdapterConfig]]:
        """(name, layout, configuration) of these clients, as an Aggregator plans with them."""
        for client in clients:
            adapter = self.kinds[self.place(client)]
            yield client, adapter.layout, adapter.config

    def check_update(self, client: str, adapter: Adapter) -> None:
        """Whether an adapter is of the client's kind, but for its dtypes and its keys' prefix.

        Raises:
            InvalidInput: it is not, or there is no such client.
        """
        check_alike(adapter, self.kinds[self.place(client)], client)


def check_alike(adapter: Adapter, expected: Adapter, client: str | None) -> None:
    """Whether two adapters have the same modules and whole tensors, shapes, ranks and scalings.

    Raises:
        InvalidInput: they have not; the first difference is named.
    """
    pairs = (
        ("the module", _modules(expected), _modules(adapter)),
        ("the tensor", _whole(expected), _whole(adapter)),
    )
    for what, wanted, found in pairs:
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InvalidInput(
                    f"{what} is not as the client was registered",
                    client=client,
                    module=name,
                    expected=wanted.get(name, "none"),
                    got=found.get(name, "none"),
                    cure="Send an adapter of the configuration that the client was registered with",
                )


def _modules(adapter: Adapter) -> dict[str, str]:
    return {
        slot.module: f"{slot.kind} {'x'.join(map(str, slot.weight_shape))}"
        f"{' transposed' if slot.transposed else ''} of rank {slot.rank} and scaling {slot.scaling}"
        for slot in adapter.layout.slots
    }


def _whole(adapter: Adapter) -> dict[str, str]:
    return {span.key: "x".join(map(str, span.shape)) for span in adapter.layout.whole}


def kind_digest(adapter: Adapter) -> str:
    """Equal for adapters that differ in their numbers alone."""
    spans = sorted((span.source, span.shape, str(span.dtype)) for span in adapter.layout.tensors)
    text = f"{adapter.config.canonical}\x1f{spans}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
