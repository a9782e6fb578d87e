"""The aggregator in NVFlare's hands: FLModels in, one FLModel out, against the equations in float64."""

from __future__ import annotations

import gc
import inspect
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_config, make_folder, same_bits
from equations import Client, all_modules, client, exact, mixed_round, one_thread, optimal_error

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs

from fastagg import Adapter, Aggregator, InvalidInput, MemoryBudgetExceeded
from fastagg.engines.nvflare import FastAggModelAggregator

__all__ = ["one_thread"]

RANKS = (2, 4, 8, 16)


def four(seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[Client]:
    """Clients of the ranks 2, 4, 8 and 16 with PEFT's alpha = 16, as one configuration has them."""
    return [
        client(f"site-{k}", rank, weight=10.0 * k, seed=seed + k, dtype=dtype, alpha=16.0, **options)
        for k, rank in enumerate(RANKS, start=1)
    ]


def model_of(each: Client, *, config: bool = False, **meta: Any) -> FLModel:
    """What NVFlare hands to the aggregator: its controllers add the client's name."""
    meta = {"client_name": each.name, "NUM_STEPS_CURRENT_ROUND": each.weight, **meta}
    if config:
        meta["adapter_config"] = dict(each.adapter.config.raw)
    params = {key: value.clone() for key, value in each.adapter.state_dict().items()}
    return FLModel(params_type="FULL", params=params, meta=meta, current_round=0)


def global_config(rank: int = 16, **options: Any) -> dict[str, Any]:
    return dict(client("global", rank, alpha=16.0, **options).adapter.config.raw)


def global_delta(result: FLModel, module: str, rank: int) -> torch.Tensor:
    """s B A of the first ranks, in float64, by the scaling that the model's meta says."""
    adapter = Adapter(_tensors(result), result.meta["adapter_config"])
    a, b = adapter.factors(module)
    return adapter.scaling(module) * b[:, :rank].double() @ a[:rank].double()


def _tensors(result: FLModel) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in result.params.items()}


def assert_optimal(clients: list[Client], result: FLModel, ranks: tuple[int, ...] = RANKS) -> None:
    for module in all_modules(clients):
        target = exact(clients, module)
        for rank in ranks:
            handed = global_delta(result, module, rank).reshape(target.shape)
            error = float((handed - target).norm())
            assert error <= optimal_error(target, rank) + 3e-6 * float(target.norm())


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.base_model.model."])
def test_every_rank_of_the_global_adapter_is_the_best_of_its_rank(seed: int, prefix: str) -> None:
    clients = four(seed, prefix=prefix, special=True, saved=True)
    aggregator = FastAggModelAggregator(global_config(special=True, saved=True))
    for each in clients:
        aggregator.accept_model(model_of(each))
    result = aggregator.aggregate_model()
    assert result.params_type == ParamsType.FULL
    assert result.params.keys() == clients[-1].adapter.state_dict().keys()
    assert_optimal(clients, result)
    saved = [each.adapter.state_dict()[f"{prefix}score.weight"].double() for each in clients]
    mean = sum(each.weight * value for each, value in zip(clients, saved, strict=True)) / 100
    assert torch.allclose(result.params[f"{prefix}score.weight"].double(), mean, atol=1e-6)


def test_clients_that_differ_in_everything_send_their_own_configurations(seed: int) -> None:
    clients = mixed_round(seed)
    aggregator = FastAggModelAggregator()
    for each in reversed(clients):
        aggregator.accept_model(model_of(each, config=True))
    result = aggregator.aggregate_model()
    for module in all_modules(clients):
        largest = max(each.adapter.rank(module) for each in clients if module in each.modules)
        target = exact(clients, module)
        handed = global_delta(result, module, largest).reshape(target.shape)
        error = float((handed - target).norm())
        assert error <= optimal_error(target, largest) + 3e-6 * float(target.norm())


def test_ranks_above_that_of_dw_change_nothing_and_can_be_trained(seed: int) -> None:
    clients = four(seed)[:1]
    aggregator = FastAggModelAggregator(global_config())
    aggregator.accept_model(model_of(clients[0]))
    result = aggregator.aggregate_model()
    assert_optimal(clients, result, (2, 16))
    for module in all_modules(clients):
        a = result.params[f"base_model.model.{module}.lora_A.weight"]
        b = result.params[f"base_model.model.{module}.lora_B.weight"]
        assert bool(((a != 0).any(1) | (b != 0).any(0)).all())


@pytest.mark.parametrize("method", ["fedit", "zeropad", "hetlora"])
def test_the_other_methods_agree_with_the_aggregator_itself(seed: int, method: str) -> None:
    clients = four(seed)[-1:] if method == "fedit" else four(seed)
    aggregator = FastAggModelAggregator(global_config(), method=method)
    direct = Aggregator(method)
    for each in clients:
        aggregator.accept_model(model_of(each))
        direct.add(each.update)
    result, aggregate = aggregator.aggregate_model(), direct.finalize()
    for module in all_modules(clients):
        whole = aggregate.delta(module).double()
        assert torch.allclose(global_delta(result, module, 16), whole, atol=1e-5)


def test_a_method_whose_clients_merge_is_refused() -> None:
    with pytest.raises(InvalidInput, match="FastAggRecipe"):
        FastAggModelAggregator(global_config(), method="flora")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_and_crosses_the_wire(seed: int, dtype: torch.dtype) -> None:
    aggregator = FastAggModelAggregator(global_config())
    sent = [model_of(each) for each in four(seed, dtype)]
    for model in sent:
        aggregator.accept_model(fobs.loads(fobs.dumps(model)))
    result = aggregator.aggregate_model()
    assert {value.dtype for value in result.params.values()} == {dtype}
    assert same_bits(fobs.loads(fobs.dumps(result)).params, result.params)


def test_numpy_comes_back_as_numpy(seed: int) -> None:
    clients = [client(f"site-{k}", 16, weight=k, seed=seed + k, alpha=16.0) for k in (1, 2)]
    aggregator = FastAggModelAggregator(global_config())
    for each in clients:
        model = model_of(each)
        model.params = {key: value.numpy() for key, value in model.params.items()}
        for array in model.params.values():
            array.flags.writeable = False
        aggregator.accept_model(model)
    result = aggregator.aggregate_model()
    assert all(isinstance(value, np.ndarray) for value in result.params.values())
    assert_optimal(clients, result, (16,))


def test_numpy_of_another_rank_is_an_error_that_names_the_format(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config())
    model = model_of(four(seed)[0])
    model.params = {key: value.numpy() for key, value in model.params.items()}
    aggregator.accept_model(model)
    with pytest.raises(InvalidInput, match=r"ExchangeFormat\.PYTORCH"):
        aggregator.aggregate_model()


class Lazy:
    """A reference such as NVFlare's disk offload hands over; counts the bytes that are in memory."""

    held = 0
    most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def materialize(self) -> torch.Tensor:
        tensor = self._tensor.clone()
        Lazy.held += tensor.nbytes
        Lazy.most = max(Lazy.most, Lazy.held)
        weakref.finalize(tensor.untyped_storage(), Lazy.release, tensor.nbytes)
        return tensor

    @classmethod
    def release(cls, nbytes: int) -> None:
        cls.held -= nbytes


def test_references_are_read_one_client_at_a_time(seed: int) -> None:
    clients = [client(f"site-{k}", 16, weight=k, seed=seed + k, alpha=16.0) for k in range(1, 7)]
    models = [model_of(each) for each in clients]
    for model in models:
        model.params = {key: Lazy(value) for key, value in model.params.items()}
    Lazy.held = Lazy.most = 0
    aggregator = FastAggModelAggregator(global_config())
    for model in models:
        aggregator.accept_model(model)
        gc.collect()
        assert Lazy.held == 0
    assert Lazy.most == sum(value.nbytes for value in clients[0].adapter.state_dict().values())
    assert_optimal(clients, aggregator.aggregate_model(), (16,))


def test_nothing_of_an_update_is_kept(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config(), accumulator="dense")
    model = model_of(four(seed)[0])
    kept = [weakref.ref(value) for value in model.params.values()]
    aggregator.accept_model(model)
    del model
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def bad(each: Client, what: str) -> FLModel:
    model = model_of(each)
    key = next(iter(model.params))
    if what == "nan":
        model.params[key][0, 0] = float("nan")
    elif what == "shape":
        model.params[key] = model.params[key][:, :-1]
    elif what == "lacks B":
        del model.params[key.replace("lora_A", "lora_B")]
    elif what == "no tensors":
        model.params = {"weight": "text"}
    elif what == "diff":
        model.params_type = ParamsType.DIFF
    elif what == "weight":
        model.meta["NUM_STEPS_CURRENT_ROUND"] = -1
    elif what == "text weight":
        model.meta["NUM_STEPS_CURRENT_ROUND"] = "many"
    return model


@pytest.mark.parametrize(
    "what", ["nan", "shape", "lacks B", "no tensors", "diff", "weight", "text weight", "twice"]
)
def test_an_update_that_cannot_be_used_is_refused_whole(seed: int, what: str) -> None:
    clients = four(seed)
    results = []
    for disturbed in (False, True):
        aggregator = FastAggModelAggregator(global_config())
        for each in clients[:2]:
            aggregator.accept_model(model_of(each))
        if disturbed:
            wrong = clients[0] if what == "twice" else clients[3]
            with pytest.raises(InvalidInput, match=wrong.name):
                aggregator.accept_model(bad(wrong, what))
        aggregator.accept_model(model_of(clients[2]))
        results.append(aggregator.aggregate_model())
    assert same_bits(results[0].params, results[1].params)


def test_a_difference_of_factors_is_refused_with_the_cure(seed: int) -> None:
    with pytest.raises(InvalidInput, match=r"TransferType\.FULL"):
        FastAggModelAggregator(global_config()).accept_model(bad(four(seed)[0], "diff"))


def test_tensors_without_a_configuration_are_refused_with_the_cure(seed: int) -> None:
    with pytest.raises(InvalidInput, match=r"site-1.*adapter_config.*LoraConfig"):
        FastAggModelAggregator().accept_model(model_of(four(seed)[0]))


def test_what_does_not_fit_the_memory_is_refused(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config(), max_memory=1000, accumulator="stack")
    with pytest.raises(MemoryBudgetExceeded):
        aggregator.accept_model(model_of(four(seed)[3]))


def test_without_a_usable_update_the_global_model_stays(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config())
    before = FLModel(params_type="FULL", params=model_of(four(seed)[3]).params)
    kept = {key: value.clone() for key, value in before.params.items()}
    after = FLModelUtils.update_model(before, aggregator.aggregate_model())
    assert same_bits(after.params, kept)


def test_rounds_do_not_mix(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config())
    aggregator.accept_model(model_of(four(seed)[0]))
    aggregator.reset_stats()
    clients = four(seed + 10)
    for each in clients:
        aggregator.accept_model(model_of(each))
    assert_optimal(clients, aggregator.aggregate_model())


def test_the_weight_is_read_under_its_key_and_missing_counts_one(seed: int) -> None:
    one, two = (client(f"site-{k}", 4, weight=w, seed=seed + k, alpha=16.0) for k, w in ((1, 1), (2, 3)))
    aggregator = FastAggModelAggregator(global_config(4), weight_field="num_examples")
    aggregator.accept_model(model_of(one))
    aggregator.accept_model(model_of(two, num_examples=np.int64(3)))
    assert_optimal([one, two], aggregator.aggregate_model(), (4,))


def test_metrics_are_averaged_for_the_model_selection(seed: int) -> None:
    aggregator = FastAggModelAggregator(global_config())
    for each in four(seed):
        model = model_of(each)
        model.metrics = {"loss": each.weight, "text": "ignored"}
        aggregator.accept_model(model)
    # The weights are 10, 20, 30, 40.
    assert aggregator.aggregate_model().metrics == {"loss": pytest.approx(3000 / 100)}


def test_scatter_and_gather_is_told_whether_an_update_counts(seed: int) -> None:
    clients = four(seed)
    aggregator = FastAggModelAggregator(global_config())
    for each, spoiled in zip(clients, (False, False, True, False), strict=True):
        model = bad(each, "nan") if spoiled else model_of(each)
        peer, context = FLContext(), FLContext()
        peer.set_prop("__identity_name__", each.name, private=False)
        context.set_peer_context(peer)
        dxo = DXO(DataKind.WEIGHTS, model.params, {"NUM_STEPS_CURRENT_ROUND": each.weight})
        assert aggregator.accept(dxo.to_shareable(), context) is not spoiled
    result = FLModelUtils.from_shareable(aggregator.aggregate(FLContext()))
    assert_optimal([clients[0], clients[1], clients[3]], result)


def test_every_option_of_the_aggregator_is_there() -> None:
    own = inspect.signature(FastAggModelAggregator).parameters
    options = dict(inspect.signature(Aggregator).parameters)
    del options["process_group"]  # a server of NVFlare's is one process
    for name, parameter in options.items():
        assert own[name].default == parameter.default


@pytest.mark.parametrize("kind", ["fields", "folder", "peft"])
def test_a_configuration_is_taken_in_every_form(tmp_path: Path, kind: str) -> None:
    given: Any = make_config(rank=16)
    if kind == "folder":
        given = make_folder(tmp_path / "adapter", rank=16)
    elif kind == "peft":
        peft = pytest.importorskip("peft")
        given = peft.LoraConfig(r=16, lora_alpha=16, target_modules={"q_proj", "v_proj"})
    aggregator = FastAggModelAggregator(given)
    assert json.loads(json.dumps(aggregator.config)) == aggregator.config
    assert aggregator.config["r"] == aggregator.config["lora_alpha"] == 16


def test_an_exported_job_holds_every_argument(tmp_path: Path) -> None:
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.fuel.utils.class_utils import instantiate_class
    from nvflare.job_config.api import FedJob

    given = FastAggModelAggregator(
        global_config(), method="zeropad", max_memory="1GiB", missing="zero", dtype="float16", seed=3
    )
    job = FedJob(name="exported", min_clients=1)
    job.set_app_packages(["fastagg"])
    job.to_server(FedAvg(num_clients=1, num_rounds=1, persistor_id="", model={}, aggregator=given))
    job.export_job(str(tmp_path))
    (file,) = tmp_path.rglob("config_fed_server.json")
    written = json.loads(file.read_text())["workflows"][0]["args"]["aggregator"]
    made = instantiate_class(written["path"], written["args"])
    for name in inspect.signature(FastAggModelAggregator).parameters:
        assert getattr(made, name) == getattr(given, name)


def test_a_recipe_for_differences_is_refused_before_the_job() -> None:
    from nvflare.recipe.utils import validate_aggregator_data_kind

    with pytest.raises(ValueError, match="WEIGHTS"):
        validate_aggregator_data_kind(
            data_kind=DataKind.WEIGHT_DIFF,
            recipe_name="FedAvgRecipe",
            aggregator=FastAggModelAggregator(global_config()),
        )
