"""What a configuration describes: the base model, each client's examples, and each one's adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import ConcatDataset

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients import ranks
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.ranks import ClientRanks
from fastagg.federated.clients.token_loss import Encoded
from fastagg.federated.clients.training import LocalTraining
from fastagg.federated.data.encoded_file import read_encoded
from fastagg.federated.data.examples import Example
from fastagg.federated.data.prompt import Tokeniser
from fastagg.federated.seeds import seed_of
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.preparation import Prepared, load_tokeniser
from fastagg.federated.simulation.settings import FederationSection

if TYPE_CHECKING:
    from peft import LoraConfig

# Names of clients come from those of files or labels, which never begin with a dot.
POOLED = ".pooled"


@dataclass(frozen=True, eq=False)
class Cohort:
    """One model and the clients that share it, the same for every method of a run.

    Attributes:
        model: the base that all clients begin with.
        clients: in the order in which they train.
        pooled: one that has the examples of all, and the largest of their adapters.
        fresh: name -> an adapter of the client's own configuration, with B = 0. Those of clients that
            do not differ share their memory.
    """

    config: RunConfig
    prepared: Prepared
    model: LocalModel
    clients: tuple[Client, ...]
    pooled: Client
    fresh: Mapping[str, Adapter]

    @classmethod
    def open(cls, config: RunConfig, prepared: Prepared) -> Cohort:
        """Loads the model, and maps what the clients train on.

        Raises:
            InvalidInput: a model that cannot be had, or ranks that do not fit the clients.
        """
        model = _model(config, prepared)
        names = prepared.names()
        own_ranks = _ranks(config, names, model)
        _check_numbers(config, prepared)
        training = _training(config)
        clients, kinds, fresh = [], _Kinds(config, model), {}
        for name in names:
            file = prepared.examples(name)
            lora, adapter = kinds.of(own_ranks[name])
            fresh[name] = Adapter.from_flat(adapter.flat, adapter.layout, adapter.config, name=name)
            clients.append(
                Client(
                    name,
                    read_encoded(file, "train"),
                    read_encoded(file, "held_out"),
                    config=lora,
                    model=model,
                    training=training,
                    seed=config.seed,
                )
            )
        largest = max(clients, key=lambda client: fresh[client.name].nbytes)
        pooled = _pooled(config, clients, largest.config)
        return cls(
            config,
            prepared,
            model,
            tuple(clients),
            pooled,
            fresh | {POOLED: fresh[largest.name]},
        )

    @cached_property
    def by_name(self) -> Mapping[str, Client]:
        """The clients by their names."""
        return {client.name: client for client in self.clients}

    @cached_property
    def tokeniser(self) -> Tokeniser:
        """The model's."""
        return load_tokeniser(self.config)

    @cached_property
    def questions(self) -> Mapping[str, tuple[Example, ...]]:
        """Name -> the held-out examples that are evaluated, as text, where answers are wanted."""
        return self.prepared.questions()

    def restart(self) -> None:
        """The base weights are what they were before the first round."""
        if self.model.round > 1:
            self.model.restart(lambda: _model(self.config, self.prepared).network)


def participants(federation: FederationSection, clients: int) -> int:
    """How many of so many clients a round asks for."""
    wanted = federation.clients_per_round or max(1, round(federation.participation * clients))
    return min(max(wanted, federation.min_clients), clients)


def _check_numbers(config: RunConfig, prepared: Prepared) -> None:
    """What would be heard of only when a client has trained, or all have."""
    names, least = prepared.names(), config.federation.min_clients
    if least > len(names):
        raise InvalidInput(
            "more clients than there are",
            field="federation.min_clients",
            expected=f"at most {len(names)}",
            got=least,
        )
    for name in names if config.training.patience else ():
        if not len(read_encoded(prepared.examples(name), "held_out")):
            raise InvalidInput(
                "early stopping goes by held-out examples, and the client has none",
                client=name,
                field="training.patience",
                cure="Hold some out, or train without early stopping",
            )


class _Kinds:
    """Clients of the same ranks have one configuration and one fresh adapter."""

    def __init__(self, config: RunConfig, model: LocalModel) -> None:
        self._config = config
        self._model = model
        self._made: dict[object, tuple[LoraConfig, Adapter]] = {}

    def of(self, own: ClientRanks) -> tuple[LoraConfig, Adapter]:
        key = (own.rank, tuple(own.pattern.items()))
        if key not in self._made:
            lora = _lora(self._config, own)
            with self._model.adapter(lora, seed=seed_of(self._config.seed, "factors", 1)):
                self._made[key] = lora, self._model.capture()
        return self._made[key]


def _pooled(config: RunConfig, clients: Sequence[Client], lora: LoraConfig) -> Client:
    """All examples in one place, and as many steps in a round as its participants take together, were
    all clients drawn alike."""
    trains, held_out = (
        cast("Sequence[Encoded]", ConcatDataset(cast(Any, parts)))
        for parts in ([each.train for each in clients], [each.held_out for each in clients])
    )
    own, asked = clients[0].training, participants(config.federation, len(clients))
    of_all = sum(own.total_steps(len(each.train)) for each in clients)
    training = replace(own, epochs=None, steps=math.ceil(of_all * asked / len(clients)))
    model = clients[0].model
    return Client(
        POOLED, trains, held_out, config=lora, model=model, training=training, seed=config.seed
    )


def _model(config: RunConfig, prepared: Prepared) -> LocalModel:
    wanted = config.model
    device = wanted.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(torch, wanted.dtype)
    if wanted.name != "embedded":
        return LocalModel.from_pretrained(
            wanted.name, dtype=dtype, device=device, revision=wanted.revision or None
        )
    model = LocalModel.from_pretrained(prepared.base, dtype=dtype, device=device)
    # Adapters would name it as their base, and a run's folder may be moved.
    network: Any = model.network
    network.name_or_path = ""
    return model


def _ranks(config: RunConfig, names: Sequence[str], model: LocalModel) -> dict[str, ClientRanks]:
    wanted = config.ranks
    match wanted.scheme:
        case "each":
            return ranks.each(wanted.each, names)
        case "flora":
            return ranks.flora(names)
        case "memory":
            with model.adapter(_lora(config, ClientRanks(1))):
                slots = model.capture().layout.slots
            shapes = {slot.module: (slot.m, slot.n) for slot in slots}
            return ranks.by_memory(wanted.budgets(), names, shapes)
        case distribution:
            types = [each.ranks() for each in wanted.types]
            return ranks.distributed(distribution, names, seed=config.seed, types=types)


def _lora(config: RunConfig, own: ClientRanks) -> LoraConfig:
    from peft import LoraConfig

    wanted = config.lora
    return LoraConfig(
        **own.lora_fields(wanted.alpha_over_rank),
        target_modules=wanted.target_modules,
        lora_dropout=wanted.dropout,
        use_rslora=wanted.rslora,
        task_type="CAUSAL_LM",
    )


def _training(config: RunConfig) -> LocalTraining:
    wanted = config.training
    return LocalTraining(
        epochs=wanted.epochs or None,
        steps=wanted.steps or None,
        batch=wanted.batch,
        learning_rate=wanted.learning_rate,
        schedule=wanted.schedule,
        warm_up=wanted.warm_up,
        weight_decay=wanted.weight_decay,
        clip=wanted.clip or None,
        patience=wanted.patience or None,
        evaluate_every=wanted.evaluate_every or None,
    )
