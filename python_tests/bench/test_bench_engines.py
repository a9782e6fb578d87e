"""The measurement of the integrations: all of them do the Aggregator's work, and the record says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("flwr")
pytest.importorskip("nvflare")

from bench import engines
from bench.engine_rounds import ENGINES
from bench.engine_work import Work, check_same, from_updates

# numpy has no bfloat16.
CASES = [(name, torch.float16 if name == "FATE-LLM" else torch.bfloat16) for name in ENGINES]


@pytest.mark.parametrize(("name", "dtype"), [*CASES, *((name, torch.float32) for name in ENGINES)])
def test_an_integration_hands_out_what_the_aggregator_does(name: str, dtype: torch.dtype) -> None:
    work = Work(3, 24, (2, 4, 8), dtype, 1)
    engine = ENGINES[name]
    handed_out = engine.handed_out
    handed = engine.integration(work)()
    assert [len(state) for state in handed] == [6] * (3 * handed_out.clients + handed_out.model)
    check_same(name, handed, from_updates(work, handed_out)())
    key = next(iter(handed[0]))
    handed[0] = {**handed[0], key: handed[0][key] + 1}
    with pytest.raises(RuntimeError, match=name):
        check_same(name, handed, from_updates(work, handed_out)())


def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    engines.main(
        ["--modules", "2", "--size", "16", "--ranks", "2,4", "--repeats", "3", "--record", str(file)]
    )
    record = json.loads(file.read_text())
    assert [row["engine"] for row in record["rows"]] == list(ENGINES)
    assert record["repeats"] == 3
    for row in record["rows"]:
        added = row["added"]
        assert added["low"] <= added["median"] <= added["high"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ENGINES)
