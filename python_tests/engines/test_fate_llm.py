"""FATE's arbiter, on lists of arrays without names; its context by the calls that it documents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sent_state_dicts import CONFIG, LIVE_KEYS, Sent, check_optimal, clients, parameters, state_dict

from fastagg.engines.fate_llm import AggregatorServer
from fastagg.errors import InvalidInput

NAMES = list(state_dict(2, 0, LIVE_KEYS))
SENT, RETURNED = "fedavg_model_mixed_client_values", "fedavg_model_aggregated_values"


class Party:
    """A party's two boxes, by message name."""

    def __init__(self, message: Any) -> None:
        self.sent = {SENT: message}
        self.received: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        return self.sent[name]

    def put(self, name: str, value: Any) -> None:
        self.received[name] = value


def context(messages: list[Any]) -> SimpleNamespace:
    """The guest is party 0, the hosts are 1, 2, ...; a message is (arrays, weight)."""
    return SimpleNamespace(
        guest=SimpleNamespace(rank=0),
        hosts=SimpleNamespace(ranks=list(range(1, len(messages)))),
        parties=[Party(message) for message in messages],
    )


def arrays(each: Sent, dtype: Any = np.float64) -> list[np.ndarray[Any, Any]]:
    """In the order of ``model.parameters()``, float64 as FATE makes them."""
    return [each.state[name].numpy().astype(dtype) for name in NAMES]


def shares(sent: list[Sent]) -> list[float]:
    total = sum(each.weight for each in sent)
    return [each.weight / total for each in sent]


def named(received: list[np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in zip(NAMES, received, strict=True)}


def test_the_signature_is_the_hooks() -> None:
    def model_aggregation(self: Any, ctx: Any, ranks: Any = None) -> None: ...

    assert parameters(AggregatorServer.model_aggregation) == parameters(model_aggregation)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_party_is_sent_the_optimum_at_its_own_rank(dtype: Any) -> None:
    half = dtype == np.float16
    sent = clients([LIVE_KEYS], dtype=torch.float16 if half else torch.float32)
    messages = [(arrays(each, dtype), share) for each, share in zip(sent, shares(sent), strict=True)]
    held = [[array.tobytes() for array in arrays_] for arrays_, _ in messages]
    ctx = context(messages)
    server = AggregatorServer(NAMES, CONFIG)
    server.model_aggregation(ctx)
    for party, each in zip(ctx.parties, sent, strict=True):
        received = party.received[RETURNED]
        # float64 is what FATE makes of float32, and it makes float32 again of what it receives.
        assert {array.dtype for array in received} == {np.dtype(np.float16 if half else np.float32)}
        check_optimal(named(received), sent, each.state, tolerance=2e-3 if half else 1e-5)
    assert held == [[array.tobytes() for array in arrays_] for arrays_, _ in messages]


def test_parties_that_take_no_part_are_not_asked() -> None:
    sent = clients([LIVE_KEYS])
    ctx = context([(arrays(each), each.weight) for each in sent])
    AggregatorServer(NAMES, CONFIG).model_aggregation(ctx, ranks=[1, 3])
    assert [bool(party.received) for party in ctx.parties] == [False, True, False, True]
    check_optimal(
        named(ctx.parties[3].received[RETURNED]),
        [sent[1], sent[3]],
        sent[3].state,
    )


def test_arrays_off_the_wire_may_be_read_only_and_of_the_other_byte_order() -> None:
    sent = clients([LIVE_KEYS])

    def foreign(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.frombuffer(array.astype(">f4").tobytes(), ">f4").reshape(array.shape)

    ctx = context([([foreign(array) for array in arrays(each)], each.weight) for each in sent])
    AggregatorServer(NAMES, CONFIG).model_aggregation(ctx)
    check_optimal(named(ctx.parties[1].received[RETURNED]), sent, sent[1].state)


def test_without_weights_all_parties_count_alike() -> None:
    sent = clients([LIVE_KEYS], weights=(1, 1, 1, 1))
    ctx = context([(arrays(each, np.float32), None) for each in sent])
    AggregatorServer(NAMES, CONFIG).model_aggregation(ctx)
    check_optimal(named(ctx.parties[0].received[RETURNED]), sent, sent[0].state)


def test_what_cannot_be_aggregated_is_named_and_nobody_gets_a_reply() -> None:
    sent = clients([LIVE_KEYS])
    good = [(arrays(each), 1) for each in sent]
    masked = [array.astype(np.int64) for array in good[1][0]]
    server = AggregatorServer(NAMES, CONFIG)
    for bad, match in (
        (good[1][0][:-1], f"client '1'.*list of {len(NAMES)} arrays, got {len(NAMES) - 1}"),
        (masked, "client '1'.*lora_A.*int64.*plaintext"),
        (None, "client '1'.*NoneType"),
    ):
        ctx = context([good[0], (bad, 1), *good[2:]])
        with pytest.raises(InvalidInput, match=match):
            server.model_aggregation(ctx)
        assert not any(party.received for party in ctx.parties)
    with pytest.raises(InvalidInput, match=r"names"):
        AggregatorServer([*NAMES, NAMES[0]], CONFIG)
    with pytest.raises(InvalidInput, match=r"names"):
        AggregatorServer([], CONFIG)


def test_a_party_that_diverged_is_left_out_and_served_all_the_same() -> None:
    """Every party waits for its reply."""
    sent = clients([LIVE_KEYS])
    messages = [(arrays(each, np.float32), each.weight) for each in sent]
    messages[2][0][0][0, 0] = np.nan
    ctx = context(messages)
    server = AggregatorServer(NAMES, CONFIG, skip_invalid=True)
    with pytest.warns(UserWarning, match=r"client '2'.*NaN"):
        server.model_aggregation(ctx)
    assert [skipped.client for skipped in server.skipped] == ["2"]
    counted = [sent[0], sent[1], sent[3]]
    for party, each in zip(ctx.parties, sent, strict=True):
        check_optimal(named(party.received[RETURNED]), counted, each.state)
