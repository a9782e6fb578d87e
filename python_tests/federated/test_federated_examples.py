"""Examples read from the files, folders and data sets that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import natural_instructions
import pytest

from fastagg.errors import InvalidInput
from fastagg.federated.data.examples import (
    ClientData,
    Columns,
    Example,
    file_name,
    read_clients,
    read_corpus,
    read_dataset,
    read_jsonl,
    split,
)

RECORDS = [
    {
        "instruction": f"say {i}",
        "input": "" if i % 2 else f"about {i}",
        "output": f"word {i}",
        "kind": i % 3,
    }
    for i in range(10)
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # A line separator of Unicode is text to JSON, and a byte-order mark is none.
    first_line = json.dumps({**RECORDS[0], "output": "one\u2028line"}, ensure_ascii=False)
    path.write_text(f"\ufeff{first_line}\n\n{json.dumps(RECORDS[1])}", encoding="utf-8")
    first, second = read_jsonl(path, Columns(label="kind"))
    assert first == Example("say 0", "about 0", "one\u2028line", "0")
    assert second == Example("say 1", "", "word 1", "1")


def test_columns_may_have_other_names_or_none(tmp_path: Path) -> None:
    records = [{"q": "why", "a": "so", "context": None}, {"q": "who", "a": "he"}]
    path = write(tmp_path / "a.jsonl", records)
    columns = Columns(instruction="q", input="context", output="a")
    assert read_jsonl(path, columns) == (Example("why", "", "so"), Example("who", "", "he"))
    columns = Columns(instruction="", input="", output="a")
    assert read_jsonl(path, columns)[0] == Example("", "", "so")


@pytest.mark.parametrize(
    ("lines", "columns", "said"),
    [
        (["{"], Columns(), "line 1: not JSON"),
        (["[1]"], Columns(), "line 1: not a record"),
        ([""], Columns(), "no examples"),
        (['{"output": "x"}', '{"input": "y"}'], Columns("", ""), "line 2: no field 'output'"),
        (['{"output": 3}'], Columns(), "line 1: not a text"),
        (['{"output": "x", "inputs": "y"}'], Columns(instruction=""), "no field 'input'"),
        (['{"output": "x", "k": [1]}'], Columns("", "", label="k"), "line 1: not a label"),
        (['{"output": "x"}'], Columns("", "", label="k"), "no field 'k'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[str], columns: Columns, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InvalidInput, match=said) as caught:
        read_jsonl(path, columns)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_or_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b'{"output": "\xff"}')
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_jsonl(tmp_path / "bad.jsonl")
    with pytest.raises(InvalidInput, match="no folder"):
        tuple(read_clients(tmp_path / "none", seed=0))


def test_a_folder_is_a_client_a_file(tmp_path: Path) -> None:
    write(tmp_path / "zoe.jsonl", RECORDS)
    write(tmp_path / "ann.train.jsonl", RECORDS[:4])
    write(tmp_path / "ann.eval.jsonl", RECORDS[4:6])
    write(tmp_path / "ann.test.jsonl", RECORDS[6:])
    write(tmp_path / "v1.2.train.jsonl", RECORDS[:3])
    write(tmp_path / "v1.2.eval.jsonl", RECORDS[3:4])
    (tmp_path / "index.json").write_text("{}")
    ann, dotted, zoe = tuple(read_clients(tmp_path, held_out_share=0.3, seed=1))
    assert (ann.name, len(ann.train), len(ann.held_out)) == ("ann", 4, 4)
    assert ann.held_out[0].instruction == "say 6"
    assert (dotted.name, len(dotted.train), len(dotted.held_out)) == ("v1.2", 3, 1)
    assert zoe == split("zoe", read_jsonl(tmp_path / "zoe.jsonl"), 0.3, seed=1)
    assert len(next(iter(read_clients(tmp_path, held_out="eval", seed=1))).held_out) == 2


def test_folders_that_name_no_clients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no JSONL files"):
        tuple(read_clients(tmp_path, seed=0))
    write(tmp_path / "ann.test.jsonl", RECORDS)
    with pytest.raises(InvalidInput, match=r"'ann': .*ann\.test\.jsonl has no training"):
        tuple(read_clients(tmp_path, seed=0))
    write(tmp_path / "ann.train.jsonl", RECORDS)
    write(tmp_path / "ann.jsonl", RECORDS)
    with pytest.raises(InvalidInput, match="two files with training examples"):
        tuple(read_clients(tmp_path, seed=0))


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.99, 9)])
def test_split_holds_out_a_share_and_keeps_order(share: float, held_out: int) -> None:
    examples = [Example("", "", str(i)) for i in range(10)]
    client = split("a", examples, share, seed=3)
    assert len(client.held_out) == held_out
    assert sorted((*client.train, *client.held_out), key=lambda e: e.output) == examples
    for part in (client.train, client.held_out):
        assert list(part) == sorted(part, key=lambda e: e.output)
    assert split("a", examples, share, seed=3) == client


def test_split_depends_on_seed_and_name_alone() -> None:
    examples = [Example("", "", str(i)) for i in range(100)]
    parts = {split(name, examples, 0.2, seed=seed).held_out for name in "ab" for seed in (0, 1)}
    assert len(parts) == 4
    with pytest.raises(InvalidInput, match="not a share"):
        split("a", examples, 1.0, seed=0)
    with pytest.raises(InvalidInput, match="too few examples"):
        split("a", examples[:1], 0.5, seed=0)


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\nb", "c:d", "a."])
def test_clients_have_names_that_files_can_have(name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        ClientData(name, (Example("", "", "x"),), ())
    assert ClientData(file_name(name), (Example("", "", "x"),), ()).name == file_name(name)
    with pytest.raises(InvalidInput, match="nothing to train on"):
        ClientData("a", (), ())


def test_datasets_are_read_from_disk_and_from_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    names = ["red", "green", "blue"]
    made = datasets.Dataset.from_list(RECORDS).cast_column("kind", datasets.ClassLabel(names=names))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "rest": made.select([3])}).save_to_disk(str(tmp_path / "dict"))
    columns = Columns(label="kind")
    examples = read_dataset(str(tmp_path / "saved"), columns)
    assert examples[4] == Example("say 4", "about 4", "word 4", "green")
    assert read_dataset(str(tmp_path / "dict"), columns, split="rest") == (examples[3],)

    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", RECORDS)
    from_files = read_dataset(str(tmp_path / "files"), columns, split="train[:2]")
    assert from_files == read_jsonl(tmp_path / "files" / "train.jsonl", columns)[:2]
    for name, part in (("files", "none"), ("dict", "none"), ("nowhere", "train")):
        with pytest.raises(InvalidInput, match="cannot be loaded"):
            read_dataset(str(tmp_path / name), split=part)


def test_corpus_has_a_client_a_package() -> None:
    clients = read_corpus(3, held_out_share=0.2, seed=0)
    assert [client.name for client in clients] == ["asyncio", "email", "decimal"]
    for client in clients:
        assert len(client.held_out) == round(0.2 * len(client.train + client.held_out))
        assert all(not e.instruction and not e.input and e.output for e in client.train)
    with pytest.raises(InvalidInput, match="not so many clients"):
        read_corpus(1000, seed=0)


def test_natural_instructions_are_sixteen_clients() -> None:
    folder = natural_instructions.folder()
    clients = tuple(read_clients(folder, Columns(label="category"), seed=0))
    index = json.loads((folder / "index.json").read_text())
    entries = {f"client_{entry['client']:04}": entry for entry in index}
    assert [client.name for client in clients] == sorted(entries)
    for client in clients:
        entry = entries[client.name]
        assert (len(client.train), len(client.held_out)) == (entry["train"], entry["test"])
        assert all(e.instruction and e.output and e.label for e in client.train)
    for client in read_clients(folder, held_out="eval", seed=0):
        assert len(client.held_out) == entries[client.name]["eval"]
