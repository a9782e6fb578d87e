"""Simulated rounds: what is written, that a resumed run has the same bits, failures, and stopping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from simulated_runs import RANKS, assert_same_runs, configured, lines

pytest.importorskip("peft")
pytest.importorskip("pydantic")

from fastagg.adapter import Adapter
from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.server.server import TooFewUpdates
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.events import ClientFinished, Event, RoundFinished
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.simulate import simulate
from fastagg.update import ClientUpdate


def stopping_in(round: int) -> tuple[Callable[[Event], None], Callable[[], bool]]:
    """An observer and what asks to stop after the first client of a round."""
    seen: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, ClientFinished) and event.round == round:
            seen.append(round)

    return watch, lambda: bool(seen)


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "hetlora"])
@pytest.mark.parametrize("optimiser", ["fedavg", "fedadam"])
def test_a_resumed_run_has_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, method: str, optimiser: str
) -> None:
    options = {"federation__methods": method, "federation__optimiser": optimiser}
    whole = configured(settings, output__folder=tmp_path / "whole", **options)
    parts = configured(settings, output__folder=tmp_path / "parts", **options)
    assert simulate(whole)
    for stopped in (1, 2, 3):
        watch, stop = stopping_in(stopped)
        assert not simulate(parts, resume=True, observer=watch, stop=stop)
        assert RunFolder(tmp_path / "parts" / method).last_complete() == stopped - 1
    assert simulate(parts, resume=True)
    assert_same_runs(tmp_path / "whole" / method, tmp_path / "parts" / method)


def test_leftovers_of_a_round_that_is_not_complete_are_dropped(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(settings)
    assert simulate(config)
    run = tmp_path / "run" / "flexlora"
    shutil.copytree(run, tmp_path / "before")
    (run / "rounds" / "0003" / "COMPLETE").unlink()
    (run / "rounds" / "0003" / "state.safetensors").write_bytes(b"half")
    assert simulate(config, resume=True)
    assert_same_runs(tmp_path / "before", run)


def test_what_a_run_leaves(settings: dict[str, Any], tmp_path: Path) -> None:
    told: list[Event] = []
    config = configured(settings, federation__methods="flexlora,flora")
    assert simulate(config, observer=told.append)
    for method in ("flexlora", "flora"):
        run = tmp_path / "run" / method
        found = RunFolder(run).metrics()
        rounds = [line for line in found if line["kind"] == "round"]
        clients = [line for line in found if line["kind"] == "client"]
        assert [line["round"] for line in rounds] == [0, 1, 2, 3]
        assert [(line["client"], line["rank"]) for line in clients[:3]] == list(
            zip("abc", RANKS, strict=True)
        )
        assert rounds[-1]["loss"] < rounds[0]["loss"]
        for line in rounds:
            assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
            own = [client for client in clients if client["round"] == line["round"]]
            assert sum(client["bytes_up"] for client in own) == line["bytes_up"]
            assert set(line["seconds"]) == {"train", "aggregate", "evaluate", "other"}
        assert RunConfig.read(run / "config.toml").federation.methods == (method,)
    events = [event for event in told if isinstance(event, RoundFinished)]
    assert [event.round for event in events] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_methods_begin_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """Same base, same first adapters, same batches: in round 1 the clients do the same."""
    assert simulate(configured(settings, federation__methods="flora,flexlora,zeropad"))
    first = [
        [
            (line["client"], line["train_loss"], line["steps"])
            for line in lines(tmp_path / "run" / method)
            if line["kind"] == "client" and line["round"] == 1
        ]
        for method in ("flora", "flexlora", "zeropad")
    ]
    assert first[0] == first[1] == first[2]
    alone = configured(settings, federation__methods="zeropad", output__folder=tmp_path / "alone")
    assert simulate(alone)
    assert_same_runs(tmp_path / "run" / "zeropad", tmp_path / "alone" / "zeropad")


def test_distances_and_spectra_are_those_of_the_sum(settings: dict[str, Any], tmp_path: Path) -> None:
    """Against float64: FLoRA's stack is dW of round 1, which FlexLoRA's clients get at their rank."""
    assert simulate(configured(settings, federation__methods="flora,flexlora", federation__rounds=1))
    run = tmp_path / "run"
    for line in RunFolder(run / "flora").metrics():
        if line["kind"] == "client" and line["round"] == 1:
            assert line["distance"] <= 1e-6 and line["optimal_distance"] <= 1e-14
    stack = Adapter.load(run / "flora" / "rounds" / "0001" / "merged")
    exact = {}
    for module in stack.modules:
        a, b = stack.factors(module)
        exact[module] = stack.scaling(module) * b.double() @ a.double()
    folder = run / "flexlora" / "rounds" / "0001"
    written = json.loads((folder / "spectra.json").read_text())["modules"]
    spectra = {module: torch.linalg.svdvals(delta) for module, delta in exact.items()}
    norm = torch.cat([delta.flatten() for delta in exact.values()]).norm()
    for module, values in spectra.items():
        rank = min(sum(RANKS), len(values))
        assert len(written[module]) == rank  # what follows is zero
        torch.testing.assert_close(
            torch.tensor(written[module]).double(), values[:rank], rtol=0, atol=2e-6 * float(norm)
        )
    for line in RunFolder(run / "flexlora").metrics():
        if line["kind"] == "client" and line["round"] == 1:
            tail = torch.cat([values[line["rank"] :] for values in spectra.values()]).norm() / norm
            own = Adapter.load(folder / "adapters" / line["client"])
            error = torch.cat(
                [(own.delta(module).double() - exact[module]).flatten() for module in exact]
            ).norm()
            assert line["optimal_distance"] == pytest.approx(float(tail), abs=1e-5)
            assert line["distance"] == pytest.approx(float(error / norm), abs=1e-5)
            assert line["distance"] == pytest.approx(line["optimal_distance"], abs=1e-5)


@pytest.mark.parametrize("method", ["zeropad", "hetlora"])
def test_distances_of_averaged_factors_are_from_the_exact_sum(
    settings: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """Not from the product of means that such a server holds, which its largest client gets whole."""
    assert simulate(configured(settings, federation__methods=method, federation__rounds=2))
    run = RunFolder(tmp_path / "run" / method)
    weights = json.loads((run.round(2) / "weights.json").read_text())
    exact: dict[str, torch.Tensor] = {}
    for client, weight in weights.items():
        update = Adapter.load(run.update(2, client))
        for module in update.modules:
            a, b = update.factors(module)
            own = weight / sum(weights.values()) * update.scaling(module) * (b.double() @ a.double())
            exact[module] = exact.get(module, torch.zeros(())) + own
    norm = torch.cat([delta.flatten() for delta in exact.values()]).norm()
    for line in run.metrics():
        if line["kind"] == "client" and line["round"] == 2:
            own_adapter = Adapter.load(run.adapter(2, line["client"]))
            error = torch.cat(
                [(own_adapter.delta(m).double() - exact[m]).flatten() for m in exact]
            ).norm()
            assert line["distance"] == pytest.approx(float(error / norm), abs=1e-6)
            assert line["distance"] > line["optimal_distance"] + 0.01


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_distances_are_from_what_an_optimiser_made(
    settings: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """The sum of its changes, or where clients merge its last change, which they get as it is."""
    config = configured(settings, federation__methods=method, federation__optimiser="fedadam")
    assert simulate(config)
    folder = tmp_path / "run" / method / "rounds" / "0003"
    state = load_file(folder / "state.safetensors")
    if method == "flora":
        merged = Adapter.load(folder / "merged")
        exact = {module: merged.delta(module).double() for module in merged.modules}
    else:
        totals = {key: tensor for key, tensor in state.items() if key.startswith("total/")}
        exact = {key.partition("/")[2]: tensor.double() for key, tensor in totals.items()}
    written = json.loads((folder / "spectra.json").read_text())["modules"]
    spectra = {module: torch.linalg.svdvals(delta) for module, delta in exact.items()}
    assert written.keys() == spectra.keys() and written
    for module, values in spectra.items():
        torch.testing.assert_close(torch.tensor(written[module]).double(), values, rtol=1e-6, atol=1e-6)
    norm = torch.cat([delta.flatten() for delta in exact.values()]).norm()
    for line in RunFolder(tmp_path / "run" / method).metrics():
        if line["kind"] == "client" and line["round"] == 3:
            rank = 10**6 if method == "flora" else line["rank"]
            tail = torch.cat([values[rank:] for values in spectra.values()]).norm() / norm
            assert line["optimal_distance"] == pytest.approx(float(tail), rel=1e-6)
            assert line["distance"] == pytest.approx(float(tail), rel=1e-4, abs=1e-14)


def test_similarity_is_the_cosine_of_the_updates(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[ClientUpdate] = []
    plain = Client.fit

    def kept(self: Client, handout: Handout, on_step: Any = None, **options: Any) -> ClientUpdate:
        sent.append(plain(self, handout, on_step, **options))
        return sent[-1]

    monkeypatch.setattr(Client, "fit", kept)
    assert simulate(configured(settings, federation__rounds=1))
    file = tmp_path / "run" / "flexlora" / "rounds" / "0001" / "similarity.json"
    table = json.loads(file.read_text())
    flat = torch.stack(
        [
            torch.cat([u.adapter.delta(m).double().flatten() for m in sorted(u.adapter.modules)])
            for u in sent
        ]
    )
    flat /= flat.norm(dim=1, keepdim=True)
    assert table["clients"] == ["a", "b", "c"]
    torch.testing.assert_close(
        torch.tensor(table["cosine"], dtype=torch.float64), flat @ flat.T, atol=1e-5, rtol=0
    )


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain = Client.fit

    def fit(self: Client, handout: Handout, on_step: Any = None, **options: Any) -> ClientUpdate:
        if self.name == name:
            raise ClientFailure(name, handout.round, "its battery is empty")
        return plain(self, handout, on_step, **options)

    monkeypatch.setattr(Client, "fit", fit)


def test_a_round_goes_on_without_a_client_that_fails(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "b")
    assert simulate(configured(settings, federation__methods="flora"))
    found = lines(tmp_path / "run" / "flora")
    for line in found:
        if line["kind"] == "round" and line["round"]:
            assert line["failures"] == {"b": "its battery is empty"}
            assert line["participants"] == 2
        if line["kind"] == "client" and line["round"]:
            assert line["participated"] == (line["client"] != "b")


def test_too_few_updates_end_the_run_or_repeat_the_round(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, "b")
        with pytest.raises(TooFewUpdates):
            simulate(configured(settings, federation__min_clients=3))
        # Two of three are drawn, and drawn again where b is among them.
        repeated = configured(
            settings,
            federation__min_clients=2,
            federation__clients_per_round=2,
            federation__on_too_few="repeat",
            output__folder=tmp_path / "repeated",
        )
        assert simulate(repeated)
        counted = [line["participants"] for line in lines(tmp_path / "repeated" / "flexlora")[::4]]
        assert counted == [0, 2, 2, 2]
        for_ever = configured(
            settings,
            federation__min_clients=3,
            federation__on_too_few="repeat",
            output__folder=tmp_path / "for ever",
        )
        with pytest.raises(FastAggError, match="10 attempts"):
            simulate(for_ever)
    assert simulate(configured(settings, federation__min_clients=3), resume=True)


def test_a_client_that_takes_too_long_has_failed(settings: dict[str, Any]) -> None:
    with pytest.raises(TooFewUpdates, match="longer than"):
        simulate(configured(settings, federation__timeout=1e-9))


def test_answers_are_generated_and_scored(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configured(
        settings,
        evaluation__answers="rouge-l,exact-match",
        evaluation__new_tokens=4,
        federation__rounds=1,
    )
    assert simulate(config)
    for line in lines(tmp_path / "run" / "flexlora"):
        if line["kind"] == "round":
            assert 0 <= line["exact_match"] <= line["rouge_l"] <= 1


def test_runs_are_not_mixed_up(settings: dict[str, Any]) -> None:
    config = configured(settings, federation__rounds=1)
    assert simulate(config)
    with pytest.raises(InvalidInput, match="holds a run already"):
        simulate(config)
    with pytest.raises(InvalidInput, match=r"training\.batch"):
        simulate(configured(settings, training__batch=3), resume=True)
    assert simulate(configured(settings, federation__rounds=2), resume=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data__path": "nowhere.jsonl"}, "nowhere"),
        ({"ranks__each": "4,2"}, "3 ranks"),
        ({"federation__methods": "flora,fedit"}, "fedit"),  # which takes equal ranks alone
        ({"lora__targets": "no_such"}, "target_modules"),
    ],
)
def test_what_is_refused_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    out = tmp_path / "new" / "run"
    with pytest.raises(InvalidInput, match=named):
        simulate(configured(settings, output__folder=out, **options))
    assert not (tmp_path / "new").exists()
    assert simulate(configured(settings, federation__rounds=1))
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(InvalidInput, match=named):
        simulate(configured(settings, **{"federation__methods": "hetlora"} | options))
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_adapters_of_the_last_round_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    assert simulate(configured(settings, output__keep="last", federation__methods="flora,flexlora"))
    for method, what, kept in (
        ("flora", "merged", ["0001", "0002", "0003"]),  # what is in the base
        ("flora", "state.safetensors", ["0003"]),
        ("flexlora", "adapters", ["0003"]),
        ("flexlora", "state.safetensors", ["0003"]),
        ("flexlora", "updates", []),
        ("flexlora", "COMPLETE", ["0001", "0002", "0003"]),
    ):
        found = (tmp_path / "run" / method / "rounds").glob(f"*/{what}")
        assert sorted(path.parent.name for path in found) == kept


def test_a_model_and_its_tokenizer_from_a_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2: Conv1D modules, and no more positions than a prompt and its answer have."""
    from tiny_models import LENGTH, gpt2
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<unk>", "Repeat", *"01234", *(digit * 4 for digit in "01234")]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = tmp_path / "gpt2"
    gpt2().save_pretrained(saved)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>").save_pretrained(
        saved
    )
    config = configured(
        settings,
        model__name=saved,
        federation__methods="flora,flexlora",
        data__length=LENGTH,
        data__prompt="alpaca",
        evaluation__answers="rouge-l",
        evaluation__new_tokens=8,
    )
    assert simulate(config)
    for method in ("flora", "flexlora"):
        losses = [row["loss"] for row in lines(tmp_path / "run" / method) if row["kind"] == "round"]
        assert losses[-1] < losses[0]


def test_rounds_between_evaluations_have_no_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    assert simulate(configured(settings, evaluation__every=2, evaluation__distance="false"))
    found = lines(tmp_path / "run" / "flexlora")
    losses = [line["loss"] is None for line in found if line["kind"] == "round"]
    assert losses == [False, True, False, False]
    assert all(line["distance"] is None for line in found if line["kind"] == "client")
    assert not list((tmp_path / "run").rglob("spectra.json"))
