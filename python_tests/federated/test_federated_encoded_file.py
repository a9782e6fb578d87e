"""Examples that were written to a file are those that were encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastagg.federated.data.encoded_file import read_encoded, write_encoded
from fastagg.federated.data.examples import Example
from fastagg.federated.data.prompt import TEMPLATES, ByteTokeniser, encode

texts = st.text(max_size=12)
examples = st.lists(st.builds(Example, texts, texts, texts), max_size=5)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=examples, held_out=examples, length=st.integers(2, 40))
def test_what_is_read_is_what_was_encoded(
    tmp_path: Path, train: list[Example], held_out: list[Example], length: int
) -> None:
    parts = {"train": train, "held_out": held_out}
    encoded = {
        name: [encode(each, TEMPLATES["plain"], ByteTokeniser(), length) for each in own]
        for name, own in parts.items()
    }
    file = tmp_path / "folder" / "client.safetensors"
    write_encoded(file, encoded)
    for name, expected in encoded.items():
        found = read_encoded(file, name)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert torch.equal(ours.labels, theirs.labels)
        assert [len(each.labels) for each in found[1:]] == [len(e.labels) for e in expected[1:]]
        if expected:
            assert torch.equal(found[-1].labels, expected[-1].labels)
        with pytest.raises(IndexError):
            found[len(expected)]
