"""What all methods of a run share, made once and kept on the disk beside their folders.

cohort/base/                the embedded model after its pre-training, as transformers loads it
cohort/data/clients.json    the clients' names, in the order in which they train
            examples/NAME.safetensors   what each trains on and is evaluated with, as tokens
            questions.jsonl         the held-out examples as text, where answers are to be generated

Every process that trains clients opens this folder, so that none has to hold the data of all.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

__all__ = ["Prepared", "all_or_nothing", "load_tokeniser", "locked", "prepare"]

_MADE_FROM = "made-from.json"

OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The files of such a folder."""

    folder: Path
    made: Path | None = None

    @property
    def base(self) -> Path:
        """The embedded model."""
        return self.folder / "base"

    @property
    def data(self) -> Path:
        """What the clients have; ``made`` while it is being written."""
        return self.made or self.folder / "data"

    def examples(self, client: str) -> Path:
        """A client's tokens."""
        return self.data / "examples" / f"{client}.safetensors"

    def names(self) -> tuple[str, ...]:
        """The clients, in the order in which they train."""
        return tuple(json.loads((self.data / "clients.json").read_text("utf-8")))

    def questions(self) -> dict[str, tuple[Example, ...]]:
        """Client -> its held-out examples as text; empty where no answers are wanted."""
        file = self.data / "questions.jsonl"
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
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes' runs out of a folder for as long as the block lasts, however it ends.

    Raises:
        InvalidInput: a run is going on there.
    """
    new = [each for each in (out, *out.parents) if not each.exists()]
    out.mkdir(parents=True, exist_ok=True)
    file = out / ".lock"
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a kill releases
        except BlockingIOError:
            raise InvalidInput(
                f"another run is going on in {out}",
                field="output.folder",
                cure="Wait for its end, or choose another folder",
            ) from None
        try:
            yield
        finally:
            if new and list(out.iterdir()) == [file]:
                file.unlink()
                with suppress(OSError):
                    for each in new:
                        each.rmdir()


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """Removes the folder where the block that makes it fails; one that was there before stays."""
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
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
    """All of them in one folder that appears whole, unless runs here were made from other ones."""
    tokeniser = load_tokeniser(config)
    template, length = config.data.prompt_template(), config.data.length
    most = config.evaluation.max_examples or None
    names, digest = [], hashlib.blake2b(digest_size=16)
    with new_folder(prepared.data, overwrite=True) as made:
        inside = Prepared(prepared.folder, made)
        with (made / "questions.jsonl").open("w", encoding="utf-8") as questions:
            for client in _clients(config):
                parts = {"train": client.train, "held_out": client.held_out}
                write_encoded(
                    inside.examples(client.name),
                    {
                        name: (encode(each, template, tokeniser, length) for each in own)
                        for name, own in parts.items()
                    },
                )
                digest.update(client.name.encode() + inside.examples(client.name).read_bytes())
                if config.evaluation.answers:
                    own = [dataclasses.asdict(each) for each in client.held_out[:most]]
                    questions.write(json.dumps({"client": client.name, "examples": own}) + "\n")
                names.append(client.name)
        (made / "clients.json").write_text(json.dumps(names), encoding="utf-8")
        made_from = {"seed": config.seed, **config.model.model_dump(exclude={"device"})}
        made_from["data"] = digest.hexdigest()
        _check_alike(prepared, made_from)
        (made / _MADE_FROM).write_text(json.dumps(made_from), encoding="utf-8")


def _check_alike(prepared: Prepared, made_from: Mapping[str, Any]) -> None:
    """Runs of one folder share base and clients, whether they were begun together or not."""
    note = prepared.data / _MADE_FROM
    runs = [file.parent for file in prepared.folder.parent.glob("*/config.toml")]
    if not runs or not note.is_file():
        return
    before = json.loads(note.read_text("utf-8"))
    for name, value in made_from.items():
        if before.get(name) != value:
            raise InvalidInput(
                f"the runs in {prepared.folder.parent} began with another "
                + ("set of examples" if name == "data" else "model or seed"),
                field=name if name in ("data", "seed") else f"model.{name}",
                expected=before.get(name),
                got=value,
                cure="Choose another output.folder, or go on with what these runs had",
            )


def _write_base(config: RunConfig, folder: Path, on_step: OnStep) -> None:
    own = config.model.embedded
    made_from: dict[str, Any] = {"seed": config.seed, "length": config.data.length, **own.model_dump()}
    note = folder / _MADE_FROM
    if note.is_file() and json.loads(note.read_text("utf-8")) == made_from:
        return
    taken = itertools.count(1)
    # On the CPU wherever clients train: a folder's base does not depend on who made it.
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
