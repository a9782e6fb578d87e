"""One client's contribution to a round: an adapter, its weight and a name."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from dataclasses import dataclass

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput, short

__all__ = ["ClientUpdate"]


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """An adapter and what it counts.

    Args:
        adapter: an Adapter, or the folder of one.
        weight: how much it counts, its number of examples as a rule; finite, >= 0.
        client_id: the client's name; None takes the adapter's.

    Raises:
        InvalidInput: the weight, the name or the adapter cannot be used.
    """

    adapter: Adapter
    weight: float
    client_id: str

    def __init__(
        self,
        adapter: Adapter | str | os.PathLike[str],
        weight: float = 1,
        client_id: str | None = None,
    ) -> None:
        if isinstance(adapter, (str, os.PathLike)):
            adapter = _loaded(adapter, client_id)
        if not isinstance(adapter, Adapter):
            raise InvalidInput(
                "not an adapter",
                client=client_id,
                field="adapter",
                expected="an Adapter or the folder of one",
                got=type(adapter).__name__,
            )
        name = _client_id(client_id if client_id is not None else adapter.name)
        object.__setattr__(self, "adapter", adapter)
        object.__setattr__(self, "client_id", name)
        object.__setattr__(self, "weight", _weight(weight, name))
        object.__setattr__(self, "_finite", False)

    @classmethod
    def of(cls, update: ClientUpdate | str | os.PathLike[str]) -> ClientUpdate:
        """The update itself, or a folder's, which counts 1 under the folder's name.

        Raises:
            InvalidInput: neither, or as :meth:`load`.
        """
        if isinstance(update, ClientUpdate):
            return update
        if not isinstance(update, (str, os.PathLike)):
            raise InvalidInput(
                "not an update",
                field="update",
                expected="a ClientUpdate or an adapter folder",
                got=type(update).__name__,
                cure="Wrap an Adapter: ClientUpdate(adapter, weight=.., client_id=..)",
            )
        return cls.load(update)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], weight: float = 1, client_id: str | None = None
    ) -> ClientUpdate:
        """Maps a folder; see :meth:`Adapter.load`."""
        return cls(folder, weight, client_id)

    def validate(self) -> None:
        """Checks what construction did not: that every number is finite, and the file unchanged.

        The numbers are read once, however often it is called.

        Raises:
            InvalidInput: naming the client, the module and the number of bad values; or the file
                was rewritten since it was mapped.
        """
        self.adapter.check_unchanged(self.client_id)
        if not self._finite:  # type: ignore[attr-defined]
            self.adapter.check_finite(client=self.client_id)
            object.__setattr__(self, "_finite", True)


def _loaded(folder: str | os.PathLike[str], client_id: str | None) -> Adapter:
    try:
        return Adapter.load(folder)
    except InvalidInput as error:
        if client_id is None or not isinstance(client_id, str):
            raise
        raise error.for_client(client_id) from error


def _client_id(name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InvalidInput(
            "a client needs a name",
            field="client_id",
            expected="a text that is not empty",
            got=repr(name),
            cure="Pass client_id=..., or give the adapter a name",
        )
    return name


def _weight(weight: object, client: str) -> float:
    value = math.nan
    if isinstance(weight, numbers.Real) and not isinstance(weight, bool):
        with contextlib.suppress(OverflowError):
            value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise InvalidInput(
            "not a weight",
            client=client,
            field="weight",
            expected="a finite number >= 0, such as the number of examples",
            got=short(weight),
        )
    return value
