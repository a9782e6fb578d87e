"""An aggregator for NVFlare's FedAvg: its recipe, its controller, or ScatterAndGather."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DataKind
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.aggregators.weighted_aggregation_helper import (
    WeightedAggregationHelper,
    filter_aggregatable_metrics,
)
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fastagg.adapter import Adapter
from fastagg.aggregator import Aggregator
from fastagg.engines.joint_adapter import JointAdapter
from fastagg.engines.nvflare.models import CONFIG, config_in, config_of, tensors_in, weight_in
from fastagg.engines.tensor_ranks import at_ranks_of
from fastagg.errors import FastAggError, InvalidInput
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout
from fastagg.update import ClientUpdate

__all__ = ["FastAggModelAggregator"]


class FastAggModelAggregator(ModelAggregator):  # type: ignore[misc]
    """Folds each client's adapter in as it arrives, whatever its rank, and keeps none of them.

        recipe = FedAvgRecipe(..., aggregator=FastAggModelAggregator(lora_config))

    ``params`` of a model are the tensors that ``peft.get_peft_model_state_dict`` returns, under any
    prefix (``model.``), as torch tensors, numpy arrays, or references to files on the disk
    (``enable_tensor_disk_offload``), which are read one client at a time.

    The global model is one adapter: under the keys that came in, in their dtypes, of the ranks and
    scalings of ``config``, which are those of the recipe's ``model``. Its first r rows of A and columns
    of B, times the quotient of the scalings, are what a client of rank r is to go on with, and the best
    approximation of dW of that rank where the method is exact; :class:`AdapterClient` takes them so.
    Its configuration is in ``meta["adapter_config"]``; the clients' metrics are averaged.

    Clients of other ranks than the global adapter's need ``server_expected_format=PYTORCH``: with NUMPY,
    NVFlare's client reshapes what it receives to the shapes that it has sent.

    An update that cannot be used is refused whole: the error names the client, NVFlare logs it, and the
    round goes on without it. Where no update is left, the global model stays as it was.

    Args:
        config: of the global adapter, and of clients that send no ``meta["adapter_config"]`` of their
            own; theirs may be of other ranks, which are read from the tensors, at the same lora_alpha.
            A ``peft.LoraConfig``, the fields of an ``adapter_config.json``, or an adapter's folder,
            which is read at once. None: every client sends its own, and the global adapter has the
            largest rank of the round.
        weight_field: of ``FLModel.meta``: what a client counts for; 1 where it does not say.
        method, max_memory, missing, accumulator, route, device, dtype, seed: as
            :class:`fastagg.Aggregator` takes them, as text and numbers.

    Raises:
        InvalidInput: an option that does not exist, or a method whose clients merge a stack, for which
            there is :class:`FastAggController`.
    """

    expected_data_kind = DataKind.WEIGHTS

    def __init__(
        self,
        config: Any = None,
        *,
        weight_field: str = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
        method: str = "flexlora",
        max_memory: int | str | None = None,
        missing: str = "renormalise",
        accumulator: str = "auto",
        route: str = "auto",
        device: str = "auto",
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A job's configuration is written from attributes that are called as the arguments are.
        self.config = config_of(config) if config is not None else None
        self.weight_field = weight_field
        self.method = method
        self.max_memory = max_memory
        self.missing = missing
        self.accumulator = accumulator
        self.route = route
        self.device = device
        self.dtype = dtype
        self.seed = seed
        # The machine that builds the job need not have the server's GPU.
        checked = self._new_aggregator(device="cpu")
        if not checked.method.handout.ranked:
            raise InvalidInput(
                "there is no global adapter that clients could go on with: they merge the stack of all",
                field="method",
                got=repr(method),
                cure="Use fastagg.engines.nvflare.FastAggRecipe, whose clients do, or method='flexlora'",
            )
        self._config = AdapterConfig.from_dict(self.config) if self.config is not None else None
        self._aggregator: Aggregator | None = None
        self.reset_stats()

    def accept_model(self, model: FLModel) -> None:
        """Validates a client's whole update, then folds it in: all of it or nothing.

        Raises:
            InvalidInput: the update, or that it does not fit to those of the other clients.
            MemoryBudgetExceeded: it does not fit into max_memory.
        """
        if self._aggregator is None:
            self._aggregator = self._new_aggregator(self.device)
        client = _name_of(model)
        tensors = tensors_in(model, client)
        adapter = Adapter(tensors, self._config_for(model, tensors, client), name=client)
        weight = weight_in(model, self.weight_field, client)
        if weight is None:
            self.warning(f"client {client!r} counts for 1: its meta has no {self.weight_field}")
            weight = 1
        self._aggregator.add(ClientUpdate(adapter, weight, client))
        self._joint.see(adapter)
        if any(isinstance(value, np.ndarray) for value in model.params.values()):
            self._numpy_layouts.add(adapter.layout)
        self._add_metrics(model, weight, client)

    def aggregate_model(self) -> FLModel:
        """The round's global adapter; the aggregator is empty then.

        Raises:
            InvalidInput: the weights leave a module without an average, ``config`` does not fit the
                clients' modules, the numbers do not fit the dtype, or ranks differ in NumPy's format.
            MemoryBudgetExceeded: the adapter does not fit into max_memory.
        """
        if self._aggregator is None or not self._aggregator.clients:
            self.error("no usable update came in this round: the global model stays as it was")
            return FLModel(params_type=ParamsType.DIFF, params={})
        clients = len(self._aggregator.clients)
        adapter = self._joint.of(self._aggregator.finalize(), self.seed)
        self.info(f"aggregated {clients} clients by {self.method}")
        params: dict[str, Any] = adapter.state_dict()
        if self._numpy_layouts:
            self._check_numpy(adapter)
            params = {key: _as_numpy(value) for key, value in params.items()}
        return FLModel(
            params_type=ParamsType.FULL,
            params=params,
            metrics=self._metrics.get_result() or None if self._all_metrics else None,
            meta={CONFIG: dict(adapter.config.raw)},
        )

    def reset_stats(self) -> None:
        """Forgets what came in: a round begins."""
        self._aggregator = None
        self._joint = JointAdapter(self._config)
        self._numpy_layouts: set[Layout] = set()
        self._metrics = WeightedAggregationHelper()
        self._all_metrics = True

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """As ScatterAndGather calls it: whether the update was folded in."""
        self.fl_ctx = fl_ctx
        try:
            model = FLModelUtils.from_shareable(shareable, fl_ctx)
            peer = fl_ctx.get_peer_context()
            if peer is not None:
                model.meta.setdefault("client_name", peer.get_identity_name())
            self.accept_model(model)
        except FastAggError as error:
            self.error(str(error))
            return False
        return True

    def _new_aggregator(self, device: str) -> Aggregator:
        return Aggregator(
            self.method,
            max_memory=self.max_memory,
            missing=self.missing,
            accumulator=self.accumulator,
            route=self.route,
            device=device,
            dtype=self.dtype,
            seed=self.seed,
        )

    def _config_for(
        self, model: FLModel, tensors: dict[str, torch.Tensor], client: str
    ) -> AdapterConfig:
        own = config_in(model)
        if own is not None:
            return AdapterConfig.from_dict(own, client=client)
        if self._config is None:
            raise InvalidInput(
                "nobody says which configuration these tensors were trained with",
                client=client,
                field=f"meta[{CONFIG!r}]",
                cure="Give the aggregator a config, or have the client send its LoraConfig.to_dict(), "
                "as fastagg.engines.nvflare.AdapterClient does",
            )
        return at_ranks_of(self._config, tensors)

    def _check_numpy(self, adapter: Adapter) -> None:
        slots = (slot for layout in self._numpy_layouts for slot in layout.slots)
        for slot in slots:
            if slot.rank != adapter.rank(slot.module):
                raise InvalidInput(
                    "a client that exchanges NumPy arrays cannot receive another rank than it has sent",
                    module=slot.module,
                    field="server_expected_format",
                    expected="ExchangeFormat.PYTORCH",
                    got=f"NUMPY, rank {slot.rank} for one of rank {adapter.rank(slot.module)}",
                    cure="Pass server_expected_format=ExchangeFormat.PYTORCH to the recipe",
                )

    def _add_metrics(self, model: FLModel, weight: float, client: str) -> None:
        """As FedAvg's own aggregation has it: averaged if every client sends some."""
        if model.metrics is None:
            self._all_metrics = False
            return
        numbers = filter_aggregatable_metrics(model.metrics)
        if numbers and weight > 0:
            self._metrics.add(numbers, weight, client, model.current_round)


def _name_of(model: FLModel) -> str:
    name = (model.meta or {}).get("client_name") or (model.meta or {}).get(FLMetaKey.SITE_NAME)
    if not isinstance(name, str):
        raise InvalidInput(
            "an update without its client's name",
            field="meta['client_name']",
            expected="a text, which NVFlare's controllers set",
            got=repr(name),
        )
    return name


def _as_numpy(tensor: torch.Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
