"""The references: averaging of full weights, and one model on the data of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from simulated_runs import assert_same_runs, configured, lines

pytest.importorskip("peft")
pytest.importorskip("pydantic")

from test_federated_simulation import stopping_in

from fastagg.errors import InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.token_loss import loss_on
from fastagg.federated.clients.training import fit
from fastagg.federated.messages import ClientFailure
from fastagg.federated.report.compare import compare
from fastagg.federated.seeds import seed_of
from fastagg.federated.server.server import TooFewUpdates
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.preparation import Prepared
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.simulate import simulate


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


@pytest.mark.parametrize("optimiser", ["fedavg", "fedyogi"])
def test_full_is_the_average_of_what_clients_train(
    settings: dict[str, Any], tmp_path: Path, optimiser: str
) -> None:
    """Two rounds by hand, in float64, with the equations written out."""
    config = configured(
        settings,
        federation__methods="full",
        federation__rounds=2,
        federation__optimiser=optimiser,
        federation__server_learning_rate=0.05,
    )
    assert simulate(config)
    run = tmp_path / "run"
    cohort = Cohort.open(config, Prepared(run / "cohort"))
    sizes = torch.tensor([len(client.train) for client in cohort.clients], dtype=torch.float64)
    shares = sizes / sizes.sum()
    base = weights(cohort.model.network)
    m = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in base.items()}
    v = {name: torch.full_like(w, 1e-6, dtype=torch.float64) for name, w in base.items()}
    losses = []
    for number in (1, 2):
        trained = []
        for client in cohort.clients:
            cohort.model.set_weights(base)
            cohort.model.network.requires_grad_(True)
            seed = seed_of(3, "training", number, client.name)
            fit(cohort.model.network, client.train, client.training, seed=seed)
            cohort.model.network.requires_grad_(False)
            trained.append(weights(cohort.model.network))
        for name, before in base.items():
            average = sum(p * each[name].double() for p, each in zip(shares, trained, strict=True))
            step = average - before.double()
            if optimiser == "fedyogi":
                m[name] = 0.9 * m[name] + 0.1 * step
                v[name] -= 0.01 * step**2 * torch.sign(v[name] - step**2)
                step = 0.05 * m[name] / (v[name].sqrt() + 1e-3)
            base[name] = (before.double() + step).float()
        cohort.model.set_weights(base)
        losses.append(
            [loss_on(cohort.model.network, client.held_out, batch=16) for client in cohort.clients]
        )
    left = load_file(RunFolder(run / "full").weights(2))
    assert left.keys() == base.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, base[name], rtol=0, atol=2e-6)
    found = [line for line in lines(run / "full") if line["kind"] == "client" and line["round"] == 2]
    for line, loss in zip(found, losses[1], strict=True):
        assert line["held_out_loss"] == pytest.approx(loss.mean, abs=1e-5)
        assert line["rank"] is None and line["bytes_up"] == sum(w.nbytes for w in base.values())


def test_full_keeps_the_last_weights_alone_and_resumes_with_the_same_bits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    options = {"federation__methods": "full", "federation__optimiser": "fedadam", "output__keep": "last"}
    whole = configured(settings, output__folder=tmp_path / "whole", **options)
    parts = configured(settings, output__folder=tmp_path / "parts", **options)
    assert simulate(whole)
    for stopped in (1, 2, 3):
        watch, stop = stopping_in(stopped)
        assert not simulate(parts, resume=True, observer=watch, stop=stop)
    assert simulate(parts, resume=True)
    assert_same_runs(tmp_path / "whole" / "full", tmp_path / "parts" / "full")
    kept = sorted((tmp_path / "whole" / "full" / "rounds").rglob("weights.safetensors"))
    assert [path.parent.name for path in kept] == ["0003"]


def test_full_goes_on_without_a_client_that_fails(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Client.fit_weights

    def fails(self: Client, round: int, on_step: Any = None) -> dict[str, torch.Tensor]:
        if self.name == "b":
            raise ClientFailure("b", round, "its battery is empty")
        return plain(self, round, on_step)

    monkeypatch.setattr(Client, "fit_weights", fails)
    options: dict[str, Any] = {"federation__methods": "full", "federation__rounds": 1}
    assert simulate(configured(settings, **options))
    (line,) = [x for x in lines(tmp_path / "run" / "full") if x["kind"] == "round" and x["round"]]
    assert line["failures"] == {"b": "its battery is empty"} and line["participants"] == 2
    options |= {"federation__min_clients": 3, "output__folder": tmp_path / "strict"}
    with pytest.raises(TooFewUpdates, match="battery"):
        simulate(configured(settings, **options))


def test_centralized_is_one_client_with_all_examples(settings: dict[str, Any], tmp_path: Path) -> None:
    """By hand: one adapter of the largest rank, trained on all examples, going on in each round."""
    config = configured(settings, federation__methods="centralized", federation__rounds=2)
    assert simulate(config)
    run = tmp_path / "run"
    cohort = Cohort.open(config, Prepared(run / "cohort"))
    examples = [example for client in cohort.clients for example in client.train]
    steps = -(-len(examples) // 2)
    start: Any = cohort.clients[0].config
    for number in (1, 2):
        with cohort.model.adapter(start, seed=seed_of(3, "factors", 1)) as network:
            seed = seed_of(3, "training", number, ".pooled")
            outcome = fit(network, examples, cohort.pooled.training, seed=seed)
            start = cohort.model.capture()
            losses = [loss_on(network, client.held_out, batch=16).mean for client in cohort.clients]
    assert outcome.steps == steps and start.rank(start.modules[0]) == 4
    found = [line for line in lines(run / "centralized") if line["round"] == 2]
    assert [line["held_out_loss"] for line in found[1:4]] == losses
    assert [line["participated"] for line in found[1:]] == [False, False, False, True]
    assert found[4]["client"] == ".pooled" and found[4]["train_loss"] == outcome.loss
    assert found[0]["bytes_up"] == found[0]["bytes_down"] == 0
    (summary,) = compare([run / "centralized"]).summaries
    assert summary.clients == 3


def test_centralized_has_neither_an_optimiser_nor_a_time_limit_of_the_servers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = configured(settings, federation__methods="centralized", output__folder=tmp_path / "plain")
    other = configured(
        settings,
        federation__methods="centralized",
        federation__optimiser="fedadam",
        federation__timeout=1e-9,
        output__folder=tmp_path / "other",
    )
    assert simulate(plain) and simulate(other)
    assert lines(tmp_path / "plain" / "centralized") == lines(tmp_path / "other" / "centralized")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: w | {"lm_head.weight": torch.ones(1)}, "no such tensor"),
        (lambda w: {name: x[:1] if x.ndim == 1 else x for name, x in w.items()}, "not of this model"),
        (lambda w: dict(list(w.items())[1:]), "not of this model"),
        (lambda w: {name: x * float("nan") for name, x in w.items()}, "not finite"),
    ],
)
def test_full_leaves_out_an_update_that_is_none(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, reason: str
) -> None:
    plain = Client.fit_weights

    def spoilt(self: Client, round: int, on_step: Any = None) -> dict[str, torch.Tensor]:
        weights = plain(self, round, on_step)
        return spoil(weights) if self.name == "b" else weights

    monkeypatch.setattr(Client, "fit_weights", spoilt)
    assert simulate(configured(settings, federation__methods="full", federation__rounds=1))
    line = next(x for x in lines(tmp_path / "run" / "full") if x["kind"] == "round" and x["round"])
    assert line["participants"] == 2 and reason in line["failures"]["b"]
    assert line["loss"] is not None


def test_centralized_takes_the_steps_of_a_rounds_participants(settings: dict[str, Any]) -> None:
    from fastagg.federated.simulation.preparation import prepare

    for options, steps in (
        ({"training__epochs": 0, "training__steps": 5}, 15),
        ({"training__epochs": 0, "training__steps": 5, "federation__clients_per_round": 2}, 10),
        ({"training__epochs": 2, "federation__participation": 0.67}, 8),  # 12 examples by 2
    ):
        config = configured(settings, **options)
        prepared = prepare(config, Path(config.output.folder) / "cohort")
        assert Cohort.open(config, prepared).pooled.training.steps == steps


def test_references_run_beside_the_methods_from_the_same_base(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    methods = ("flora", "full", "centralized", "flexlora")
    assert simulate(configured(settings, federation__methods=",".join(methods), federation__rounds=2))
    before = {method: lines(tmp_path / "run" / method)[0]["loss"] for method in methods}
    assert len(set(before.values())) == 1
    for method in methods:
        losses = [x["loss"] for x in lines(tmp_path / "run" / method) if x["kind"] == "round"]
        assert losses[-1] < losses[0]
    alone = configured(settings, federation__methods="flexlora", output__folder=tmp_path / "alone",
                       federation__rounds=2)  # fmt: skip
    assert simulate(alone)
    assert_same_runs(tmp_path / "run" / "flexlora", tmp_path / "alone" / "flexlora")


def test_a_reference_that_there_is_not_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="centralized"):
        configured(settings, federation__methods="centralised")
