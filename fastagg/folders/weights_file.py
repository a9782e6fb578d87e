"""The weights of a round's clients: a file or a mapping, matched to the clients by name."""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastagg.errors import InvalidInput, short

__all__ = ["client_weights", "read_weights"]


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any] | list[Any]:
    """Read a weights file: JSON `{client: weight}`, a JSON list in the clients' order, or CSV lines
    `client,weight` (a heading line is allowed).

    Raises:
        InvalidInput: it cannot be read, is none of these, or names a client twice.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise _bad(f"{file} cannot be read: {reason}") from error
    if file.suffix.lower() == ".csv":
        return _from_csv(text, file)
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except InvalidInput:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(f"{file} is not JSON: {error}") from error
    if not isinstance(found, (dict, list)):
        raise _bad(f"{file} holds neither an object nor a list")
    return found


def client_weights(
    weights: Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str] | None,
    clients: Sequence[str],
) -> dict[str, float]:
    """client -> weight, every client exactly once.

    Args:
        weights: a mapping by client, a sequence in the order of `clients`, a file that
            :func:`read_weights` reads, or None for equal weights.
        clients: their names.

    Raises:
        InvalidInput: a client without a weight, a weight without a client, or one that is no finite
            number >= 0; or all of them are zero.
    """
    if weights is None:
        return dict.fromkeys(clients, 1.0)
    if isinstance(weights, (str, os.PathLike)):
        weights = read_weights(weights)
    if not isinstance(weights, Mapping):
        if len(weights) != len(clients):
            raise InvalidInput(
                "not as many weights as clients",
                field="weights",
                expected=f"{len(clients)} in the order of the folders",
                got=len(weights),
                cure="Write {client: weight}, which needs no order",
            )
        weights = dict(zip(clients, weights, strict=True))
    _check_names(weights, clients)
    checked = {client: _weight(weights[client], client) for client in clients}
    if clients and not any(checked.values()):
        raise InvalidInput(
            "all weights are zero",
            field="weights",
            expected="at least one above zero",
            cure="Leave clients without examples out, and weigh the others by theirs",
        )
    return checked


def _check_names(weights: Mapping[str, Any], clients: Sequence[str]) -> None:
    unknown = sorted(map(str, weights.keys() - set(clients)))
    lacking = sorted(set(clients) - weights.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], lacking or clients, n=1, cutoff=0.0)
        raise InvalidInput(
            f"{len(unknown)} weight(s) for no client of this round: {', '.join(unknown[:5])}",
            client=unknown[0],
            field="weights",
            expected="the name of a client" + (f", such as {near[0]!r}" if near else ""),
            cure="A client is named after its folder; remove the weights of clients that are absent",
        )
    if lacking:
        raise InvalidInput(
            f"{len(lacking)} client(s) without a weight: {', '.join(lacking[:5])}",
            client=lacking[0],
            field="weights",
            expected="a weight for every client",
            cure="Add them, with the clients' numbers of examples",
        )


def _weight(value: Any, client: str) -> float:
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of any length is JSON
            number = float(value)
    if not math.isfinite(number) or number < 0:
        raise InvalidInput(
            "not a weight",
            client=client,
            field="weights",
            expected="a finite number >= 0, such as the number of examples",
            got=short(value),
        )
    return number


def _from_csv(text: str, file: Path) -> dict[str, Any]:
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    if rows and len(rows[0]) == 2 and not _is_number(rows[0][1]):
        rows = rows[1:]
    pairs: list[tuple[str, Any]] = []
    for row in rows:
        if len(row) != 2 or not _is_number(row[1]):
            raise _bad(f"{file}: the line {','.join(row)!r} is not client,weight")
        pairs.append((row[0].strip(), float(row[1])))
    return _unique(pairs, file)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unique(pairs: Sequence[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for client, weight in pairs:
        if client in found:
            raise _bad(f"{file} names a client twice", client=client)
        found[client] = weight
    return found


def _bad(problem: str, *, client: str | None = None) -> InvalidInput:
    return InvalidInput(
        problem,
        client=client,
        field="weights",
        cure='Write JSON such as {"client-1": 1200, "client-2": 300}, or CSV lines client,weight',
    )
