"""What a configuration describes: the base model, each client's examples, and each one's adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients import ranks
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.llama import Shape, Training
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.ranks import ClientRanks
from fastagg.federated.clients.training import LocalTraining
from fastagg.federated.data import examples, partition
from fastagg.federated.data.examples import ClientData, Columns, Example
from fastagg.federated.data.prompt import ByteTokeniser, PretrainedTokeniser, Tokeniser, encode
from fastagg.federated.seeds import seed_of
from fastagg.federated.simulation.config import RunConfig

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, eq=False)
class Cohort:
    """One model and the clients that share it, the same for every method of a run.

    Attributes:
        model: the base that all clients begin with.
        clients: in the order in which they train.
        fresh: name -> an adapter of the client's own configuration, with B = 0.
        questions: name -> the held-out examples that are evaluated, as text.
    """

    model: LocalModel
    tokeniser: Tokeniser
    clients: tuple[Client, ...]
    fresh: Mapping[str, Adapter]
    questions: Mapping[str, tuple[Example, ...]]

    @classmethod
    def of(cls, config: RunConfig) -> Cohort:
        """Loads, draws and encodes all that a configuration asks for.

        Raises:
            InvalidInput: a model or data that cannot be had, or ranks that do not fit the clients.
        """
        model, tokeniser = _model(config), _tokeniser(config)
        data = _data(config)
        names = [client.name for client in data]
        of_client = _ranks(config, names, model)
        template, length = config.data.prompt_template(), config.data.length
        training = _training(config)
        clients, fresh = [], {}
        for each in data:
            lora = _lora(config, of_client[each.name])
            with model.adapter(lora, seed=seed_of(config.seed, "factors", 1)):
                fresh[each.name] = model.capture(each.name)
            clients.append(
                Client(
                    each.name,
                    [encode(example, template, tokeniser, length) for example in each.train],
                    [encode(example, template, tokeniser, length) for example in each.held_out],
                    config=lora,
                    model=model,
                    training=training,
                    seed=config.seed,
                )
            )
        most = config.evaluation.max_examples or None
        return cls(
            model, tokeniser, tuple(clients), fresh, {each.name: each.held_out[:most] for each in data}
        )


def _model(config: RunConfig) -> LocalModel:
    wanted = config.model
    device = wanted.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.name != "embedded":
        dtype: torch.dtype = getattr(torch, wanted.dtype)
        return LocalModel.from_pretrained(
            wanted.name, dtype=dtype, device=device, revision=wanted.revision or None
        )
    own = wanted.embedded
    return LocalModel.embedded(
        Shape(own.hidden, own.feed_forward, own.layers, own.heads),
        Training(own.steps, own.batch, own.learning_rate) if own.steps else None,
        length=config.data.length,
        seed=config.seed,
        device=device,
    )


def _tokeniser(config: RunConfig) -> Tokeniser:
    if config.model.name == "embedded":
        return ByteTokeniser()
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            config.model.name, revision=config.model.revision or "main"
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"no tokenizer can be loaded: {str(error).splitlines()[0]}",
            field="model.name",
            got=config.model.name,
        ) from error
    return PretrainedTokeniser(loaded)


def _data(config: RunConfig) -> tuple[ClientData, ...]:
    data, seed = config.data, config.seed
    columns = Columns(**data.columns.model_dump())
    match data.source:
        case "corpus":
            return examples.read_corpus(data.clients, held_out_share=data.held_out, seed=seed)
        case "folder":
            return examples.read_clients(
                Path(data.path),
                columns,
                held_out=data.held_out_file,
                held_out_share=data.held_out,
                seed=seed,
            )
        case "jsonl":
            found = examples.read_jsonl(Path(data.path), columns)
        case "dataset":
            found = examples.read_dataset(
                data.path, columns, split=data.split, subset=data.subset, revision=data.revision
            )
    return partition.as_clients(_shares(config, found), data.held_out, seed=seed)


def _shares(config: RunConfig, found: Sequence[Example]) -> partition.Shares:
    data, seed = config.data, config.seed
    match data.partition:
        case "iid":
            return partition.iid(found, data.clients, seed=seed)
        case "dirichlet":
            return partition.dirichlet(found, data.clients, data.alpha, seed=seed)
        case "label":
            return partition.by_label(found)


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
