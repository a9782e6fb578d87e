"""What clients train on: examples of an instruction, an input and an output, from files and data sets.

A folder of JSONL files is one client a file; everything else is one list of examples, which
:mod:`fastagg.federated.data.partition` shares out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastagg.errors import InvalidInput, short
from fastagg.federated.data.corpus import PACKAGES, docstrings
from fastagg.federated.seeds import seed_of

HeldOut = Literal["test", "eval"]


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is asked, what about, and the answer.

    Instruction and input may be empty; with neither, the output is a document of its own. The label is
    what a partition goes by, None where there is none.
    """

    instruction: str
    input: str
    output: str
    label: str | None = None


@dataclass(frozen=True)
class ClientData:
    """What one client has.

    name: also that of its files in a run's folder.
    train: at least one example; their number is the client's aggregation weight.
    held_out: examples that it does not train on.

    Raises:
        InvalidInput: a name that no file can have, or nothing to train on.
    """

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]

    def __post_init__(self) -> None:
        if self.name != file_name(self.name):
            raise InvalidInput(
                "a client's name becomes that of its files",
                client=self.name,
                field="name",
                expected=f"a name such as {file_name(self.name)!r}",
                got=repr(self.name),
            )
        if not self.train:
            raise InvalidInput("nothing to train on", client=self.name, field="train")


@dataclass(frozen=True)
class Columns:
    """The fields of a record that hold an example's parts; "" for a part that records do not have.

    A record may lack its instruction, input or label, but not its output; a field that no record of a
    source has is taken for a slip.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    label: str = ""


USUAL = Columns()


def file_name(text: str) -> str:
    """``text`` with each run of characters that file names cannot hold everywhere as one ``_``."""
    name = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]+', "_", text).strip(" .")
    return name or "_"


def read_jsonl(path: Path, columns: Columns = USUAL) -> tuple[Example, ...]:
    """Every line of a UTF-8 JSONL file that is not blank.

    Raises:
        InvalidInput: no such file, a line that is no JSON object, a missing field, a value that is not
            text, or no example at all; names the file and the line.
    """
    return _examples(_records(path), columns, source=str(path))


def read_clients(
    folder: Path,
    columns: Columns = USUAL,
    *,
    held_out: HeldOut = "test",
    held_out_share: float = 0.1,
    seed: int,
) -> Iterator[ClientData]:
    """A client for each NAME.train.jsonl or NAME.jsonl of a folder, sorted by name; each one's files are
    read when it is its turn.

    Held out are the examples of NAME.test.jsonl or NAME.eval.jsonl. Where there are both,
    ``held_out`` chooses; where there is neither, ``held_out_share`` of the training examples is
    taken, see :func:`split`.

    Raises:
        InvalidInput: no such folder or no clients in it, a held-out file without training examples,
            a client with two training files, or a file that :func:`read_jsonl` refuses.
    """
    found = sorted(_files_by_client(folder).items())
    for name, files in found:
        if "train" not in files:
            raise InvalidInput(
                f"{next(iter(files.values()))} has no training examples beside it",
                client=name,
                expected=f"{name}.train.jsonl",
            )
    for name, files in found:
        train = read_jsonl(files["train"], columns)
        other: HeldOut = "eval" if held_out == "test" else "test"
        chosen = files.get(held_out) or files.get(other)
        if chosen is None:
            yield split(name, train, held_out_share, seed=seed)
        else:
            yield ClientData(name, train, read_jsonl(chosen, columns))


def read_dataset(
    name: str,
    columns: Columns = USUAL,
    *,
    split: str = "train",
    subset: str = "",
    revision: str = "",
) -> tuple[Example, ...]:
    """A data set of the ``datasets`` library.

    Args:
        name: on the Hugging Face hub, or a folder: of data files, or written by ``save_to_disk``.
        split: the part of it, as ``datasets`` writes it: "train", "train[:10%]".
        subset: the configuration, where it has several.
        revision: a commit or a tag on the hub.

    A class label is read as the class's name.

    Raises:
        InvalidInput: it cannot be loaded, or its records are not as ``columns`` says.
    """
    source = f"{name}, split {split}"
    dataset = _load_dataset(name, split, subset, revision)
    classes = getattr(dataset.features.get(columns.label), "names", None)
    records = ((f"{source}, row {row}", dict(record)) for row, record in enumerate(dataset))
    if classes is not None:
        records = ((where, _named(record, columns.label, classes)) for where, record in records)
    return _examples(records, columns, source)


def read_corpus(clients: int, *, held_out_share: float = 0.1, seed: int) -> tuple[ClientData, ...]:
    """The embedded corpus: a client a package of the standard library, a document a docstring.

    Raises:
        InvalidInput: there are not so many packages, their sources installed.
    """
    found: list[ClientData] = []
    for name in PACKAGES:
        documents = [Example("", "", text) for text in docstrings(name)]
        if len(documents) > 1 and len(found) < clients:
            found.append(split(name, documents, held_out_share, seed=seed))
    if len(found) < clients or clients < 1:
        raise InvalidInput(
            "the embedded corpus has not so many clients",
            field="clients",
            expected=f"1 to {len(found)}",
            got=clients,
            cure="Ask for fewer, or install the sources of the standard library",
        )
    return tuple(found)


def split(name: str, examples: Sequence[Example], held_out_share: float, *, seed: int) -> ClientData:
    """One client, of whose examples a share is held out: drawn at random, their order kept.

    Any share above 0 holds out one example at least and leaves one at least.

    Raises:
        InvalidInput: a share outside [0, 1), or fewer than two examples to split.
    """
    if not 0 <= held_out_share < 1:
        raise InvalidInput(
            "not a share", client=name, field="held_out_share", expected="[0, 1)", got=held_out_share
        )
    if held_out_share == 0:
        return ClientData(name, tuple(examples), ())
    if len(examples) < 2:
        raise InvalidInput(
            "too few examples to hold any out",
            client=name,
            expected="at least 2",
            got=len(examples),
            cure="Give the client more, or hold out a share of 0",
        )
    count = min(max(1, round(held_out_share * len(examples))), len(examples) - 1)
    draw = np.random.default_rng(seed_of(seed, "held out", name))
    chosen = set(draw.choice(len(examples), count, replace=False).tolist())
    return ClientData(
        name,
        tuple(example for i, example in enumerate(examples) if i not in chosen),
        tuple(example for i, example in enumerate(examples) if i in chosen),
    )


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Where a record stands, and the record."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}", cure="JSONL files are UTF-8 text") from None


def _parsed(line: str, where: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InvalidInput(f"{where}: not a record", expected="a JSON object", got=short(record))
    return record


def _examples(
    records: Iterable[tuple[str, Mapping[str, object]]], columns: Columns, source: str
) -> tuple[Example, ...]:
    examples: list[Example] = []
    seen: dict[str, None] = {}
    for where, record in records:
        seen.update(dict.fromkeys(record))
        if columns.output not in record:
            raise _missing("output", columns.output, where, record)
        examples.append(
            Example(
                _text(record, columns.instruction, where),
                _text(record, columns.input, where),
                _text(record, columns.output, where),
                _label(record, columns.label, where),
            )
        )
    if not examples:
        raise InvalidInput(f"no examples in {source}")
    for part in ("instruction", "input", "label"):
        column = getattr(columns, part)
        if column and column not in seen:
            raise _missing(part, column, source, seen)
    return tuple(examples)


def _missing(part: str, column: str, where: str, fields: Iterable[str]) -> InvalidInput:
    none = "" if part == "output" else ', or to "" if there is none'
    return InvalidInput(
        f"{where}: no field {column!r}",
        field=f"columns.{part}",
        expected=f"one of {', '.join(fields)}",
        got=repr(column),
        cure=f"Set columns.{part} to the field that holds the {part}{none}",
    )


def _text(record: Mapping[str, object], column: str, where: str) -> str:
    value = record.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{where}: not a text", field=column, expected="a text", got=short(value))
    return value or ""


def _label(record: Mapping[str, object], column: str, where: str) -> str | None:
    value = record.get(column) if column else None
    if value is not None and not isinstance(value, (str, int)):
        raise InvalidInput(
            f"{where}: not a label", field=column, expected="a text or an integer", got=short(value)
        )
    return None if value is None else str(value)


def _named(record: dict[str, object], column: str, classes: Sequence[str]) -> dict[str, object]:
    index = record[column]
    # datasets marks an unknown class by -1.
    name = classes[index] if isinstance(index, int) and index >= 0 else None
    return {**record, column: name}


def _files_by_client(folder: Path) -> dict[str, dict[str, Path]]:
    """Client -> "train", "test", "eval" -> file."""
    if not folder.is_dir():
        raise InvalidInput(f"no folder {folder}", expected="a folder of one JSONL file per client")
    clients: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        name, _, part = path.stem.rpartition(".")
        if not name or part not in ("train", "test", "eval"):
            name, part = path.stem, "train"
        files = clients.setdefault(name, {})
        if part in files:
            raise InvalidInput(
                f"two files with training examples: {files[part].name} and {path.name}", client=name
            )
        files[part] = path
    if not clients:
        raise InvalidInput(f"no JSONL files in {folder}", expected="NAME.jsonl or NAME.train.jsonl")
    return clients


def _load_dataset(name: str, split: str, subset: str, revision: str) -> Any:
    import datasets

    saved = Path(name)
    try:
        if (saved / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        if (saved / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, subset or None, split=split, revision=revision or None)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInput(
            f"the data set cannot be loaded: {type(error).__name__}: {error}",
            field="name",
            got=repr(name),
            cure="Name a data set of the Hugging Face hub or a local folder, and one of its splits",
        ) from error
