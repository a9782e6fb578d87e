"""What all methods of a run share, made once and kept on the disk beside their folders.

cohort/base/                the embedded model after its pre-training, as transformers loads it
cohort/clients.json         the clients' names, in the order in which they train
cohort/examples/NAME.safetensors   what each of them trains on and is evaluated with, as tokens
cohort/questions.jsonl      the held-out examples as text, where answers are to be generated

Every process that trains clients opens this folder, so that none has to hold the data of all.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastagg.errors import InvalidInput
from fastagg.federated.clients.llama import Shape, Training
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.data import examples, partition
from fastagg.federated.data.encoded_file import write_encoded
from fastagg.federated.data.examples import ClientData, Columns, Example
from fastagg.federated.data.prompt import ByteTokeniser, PretrainedTokeniser, Tokeniser, encode
from fastagg.federated.simulation.config import RunConfig
from fastagg.peft_format.adapter_folder import new_folder
from fastagg.whole_file import whole_file, write_whole

__all__ = ["Prepared", "all_or_nothing", "load_tokeniser", "prepare"]

_MADE_FROM = "made-from.json"

OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The files of such a folder."""

    folder: Path

    @property
    def base(self) -> Path:
        """The embedded model."""
        return self.folder / "base"

    def examples(self, client: str) -> Path:
        """A client's tokens."""
        return self.folder / "examples" / f"{client}.safetensors"

    def names(self) -> tuple[str, ...]:
        """The clients, in the order in which they train."""
        return tuple(json.loads((self.folder / "clients.json").read_text("utf-8")))

    def questions(self) -> dict[str, tuple[Example, ...]]:
        """Client -> its held-out examples as text; empty where no answers are wanted."""
        file = self.folder / "questions.jsonl"
        found: dict[str, tuple[Example, ...]] = {}
        if file.exists():
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    found[record["client"]] = tuple(Example(**each) for each in record["examples"])
        return found


def prepare(config: RunConfig, folder: Path, on_step: OnStep = lambda step, steps: None) -> Prepared:
    """Reads, draws, encodes and trains what a configuration asks for. The base model of an earlier
    call with the same settings is kept; everything else is quickly made again.

    Args:
        on_step: told of each step of the pre-training, the first being 1, and of how many there are.

    Raises:
        InvalidInput: data that cannot be had.
    """
    prepared = Prepared(folder)
    _write_examples(config, prepared)
    if config.model.name == "embedded":
        _write_base(config, prepared.base, on_step)
    return prepared


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """Removes the folder, and those above it that are empty, where the block that makes it fails; one
    that was there before stays."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in new:
            with suppress(OSError):  # somebody else's files are in it by now
                shutil.rmtree(each) if each == folder else each.rmdir()
        raise


def load_tokeniser(config: RunConfig) -> Tokeniser:
    """The tokeniser of the configuration's model.

    Raises:
        InvalidInput: there is none, or none that can end an answer.
    """
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


def _write_examples(config: RunConfig, prepared: Prepared) -> None:
    tokeniser = load_tokeniser(config)
    template, length = config.data.prompt_template(), config.data.length
    most = config.evaluation.max_examples or None
    names = []
    with whole_file(prepared.folder / "questions.jsonl") as made, made.open("w") as questions:
        for client in _clients(config):
            parts = {"train": client.train, "held_out": client.held_out}
            write_encoded(
                prepared.examples(client.name),
                {
                    name: (encode(each, template, tokeniser, length) for each in own)
                    for name, own in parts.items()
                },
            )
            if config.evaluation.answers:
                own = [dataclasses.asdict(each) for each in client.held_out[:most]]
                questions.write(json.dumps({"client": client.name, "examples": own}) + "\n")
            names.append(client.name)
    write_whole(prepared.folder / "clients.json", json.dumps(names))


def _write_base(config: RunConfig, folder: Path, on_step: OnStep) -> None:
    own = config.model.embedded
    made_from: dict[str, Any] = {"seed": config.seed, "length": config.data.length, **own.model_dump()}
    note = folder / _MADE_FROM
    if note.is_file() and json.loads(note.read_text("utf-8")) == made_from:
        return
    taken = itertools.count(1)
    model = LocalModel.embedded(
        Shape(own.hidden, own.feed_forward, own.layers, own.heads),
        Training(own.steps, own.batch, own.learning_rate) if own.steps else None,
        length=config.data.length,
        seed=config.seed,
        on_step=lambda: on_step(next(taken), own.steps),
    )
    network: Any = model.network
    with new_folder(folder, overwrite=True) as made:
        network.save_pretrained(str(made))
        (made / _MADE_FROM).write_text(json.dumps(made_from), encoding="utf-8")


def _clients(config: RunConfig) -> Iterable[ClientData]:
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
