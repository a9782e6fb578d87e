"""OpenFedLLM's hook: its signature, and what it returns and hands out, from lists indexed by client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import make_config
from sent_state_dicts import (
    CONFIG,
    LIVE_KEYS,
    MODULES,
    PEFT_KEYS,
    RANKS,
    WEIGHTS,
    bits,
    check_optimal,
    clients,
    exact,
    parameters,
    state_dict,
)

from fastagg.engines.openfedllm import GlobalAggregate
from fastagg.errors import InvalidInput

FEDAVG = SimpleNamespace(fed_alg="fedavg", num_clients=4)


def test_the_signature_is_the_hooks() -> None:
    def global_aggregate(
        fed_args: Any, global_dict: Any, local_dict_list: Any, sample_num_list: Any,
        clients_this_round: Any, round_idx: Any, proxy_dict: Any = None, opt_proxy_dict: Any = None,
        auxiliary_info: Any = None,
    ) -> None: ...  # fmt: skip

    assert parameters(GlobalAggregate(CONFIG)) == parameters(global_aggregate)


@pytest.mark.parametrize("keys", [PEFT_KEYS, LIVE_KEYS, ("model.base_model.model.", "")])
def test_every_client_and_the_global_model_get_the_optimum_at_their_rank(keys: tuple[str, str]) -> None:
    sent = clients([keys])
    states, before = [each.state for each in sent], state_dict(8, 99, keys)
    held = [bits(state) for state in (*states, before)]
    hook = GlobalAggregate(CONFIG)
    returned, auxiliary = hook(
        FEDAVG, before, states, [each.weight for each in sent], [0, 1, 2, 3], 0,
        proxy_dict=None, opt_proxy_dict=None, auxiliary_info=(None, None),
    )  # fmt: skip
    assert auxiliary is None
    check_optimal(returned, sent, before)
    for client, each in enumerate(sent):
        check_optimal(hook.handout(client), sent, each.state)
        check_optimal(hook.handout(client, like=each.state), sent, each.state)
    assert held == [bits(state) for state in (*states, before)]


def test_only_the_clients_of_the_round_count() -> None:
    """The lists are as long as the federation, and hold what others sent in earlier rounds."""
    sent = clients()
    states = [each.state for each in sent]
    states[0] = {key: tensor * float("nan") for key, tensor in states[0].items()}
    hook = GlobalAggregate(CONFIG)
    before = state_dict(8, 99)
    returned, _ = hook(FEDAVG, before, states, list(WEIGHTS), [1, 3], 0)
    check_optimal(returned, [sent[1], sent[3]], before)
    check_optimal(hook.handout(2, like=states[2]), [sent[1], sent[3]], sent[2].state)
    with pytest.raises(InvalidInput, match=r"client '0'.*Pass like="):
        hook.handout(0)
    with pytest.raises(InvalidInput, match=r"client '9'.*clients_this_round"):
        hook(FEDAVG, before, states, list(WEIGHTS), [1, 9], 1)
    with pytest.raises(InvalidInput, match=r"clients_this_round.*nothing to aggregate"):
        hook(FEDAVG, before, states, list(WEIGHTS), [], 1)


def test_a_client_that_was_never_heard_is_served_by_its_configuration() -> None:
    """As where few clients take part in a round, and others begin the next."""
    sent = clients()
    own = {7: make_config(MODULES, rank=6, alpha=3), "ann": make_config(MODULES, rank=2)}
    hook = GlobalAggregate(CONFIG, clients=own)
    before = state_dict(8, 99, LIVE_KEYS)
    hook(FEDAVG, before, [each.state for each in sent], list(WEIGHTS), range(4), 0)
    check_optimal(hook.handout(7), sent, state_dict(6, 0, LIVE_KEYS), alpha=3)
    check_optimal(hook.handout("ann"), sent, state_dict(2, 0, LIVE_KEYS))
    with pytest.raises(InvalidInput, match=r"client '8'.*clients="):
        hook.handout(8)
    heard = state_dict(5, 3)
    check_optimal(hook.handout(8, like=heard), sent, heard)
    check_optimal(hook.handout(8), sent, heard)


def test_clients_with_an_alpha_of_their_own() -> None:
    """FLoRA's setting: alpha is twice the client's own rank."""
    sent = [
        type(each)(each.weight, each.state, alpha=2 * rank)
        for each, rank in zip(clients(), RANKS, strict=True)
    ]
    own = {k: make_config(MODULES, rank=rank, alpha=2 * rank) for k, rank in enumerate(RANKS)}
    hook = GlobalAggregate(CONFIG, clients=own)
    before = state_dict(8, 99)
    returned, _ = hook(FEDAVG, before, [each.state for each in sent], list(WEIGHTS), range(4), 0)
    check_optimal(returned, sent, before)
    for client, each in enumerate(sent):
        check_optimal(hook.handout(client), sent, each.state, alpha=each.alpha)
    wrong = GlobalAggregate(CONFIG, clients={2: make_config(MODULES, rank=4)})
    with pytest.raises(InvalidInput, match=r"client '2'.*rank"):
        wrong(FEDAVG, before, [each.state for each in sent], list(WEIGHTS), range(4), 0)


@pytest.mark.parametrize("algorithm", ["scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"])
def test_optimisers_of_averaged_factors_are_refused(algorithm: str) -> None:
    hook = GlobalAggregate(CONFIG)
    with pytest.raises(InvalidInput, match=r"fed_alg"):
        hook(SimpleNamespace(fed_alg=algorithm), state_dict(8, 1), [state_dict(2, 0)], [1], [0], 0)
    assert hook.result is None


def test_the_options_are_the_aggregators() -> None:
    sent = clients()
    hook = GlobalAggregate(CONFIG, "flexlora", accumulator="dense", route="dense", max_memory="1GiB")
    before = state_dict(16, 99)
    returned, _ = hook(FEDAVG, before, [each.state for each in sent], list(WEIGHTS), range(4), 0)
    check_optimal(returned, sent, before, tolerance=1e-3)
    assert hook.result is not None
    assert hook.result.factors(next(iter(MODULES))) is None  # dW was kept dense
    module = next(iter(MODULES))
    dw = exact(sent, module)
    torch.testing.assert_close(hook.result.delta(module).double(), dw, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"method.*stack"):
        GlobalAggregate(CONFIG, "flora")
    with pytest.raises(InvalidInput, match=r"missing"):
        GlobalAggregate(CONFIG, missing="ignore")
