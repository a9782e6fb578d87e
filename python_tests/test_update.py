"""One client's update: its weight, its name, its numbers."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, make_folder

from fastagg import ops
from fastagg.errors import InvalidInput
from fastagg.update import ClientUpdate


@pytest.mark.parametrize("weight", [0, 1, 1200, 0.25, np.int64(7), np.float32(0.5), Fraction(1, 2)])
def test_weights_are_kept_as_floats(weight: Any) -> None:
    update = ClientUpdate(make_adapter(), weight, "c7")
    assert update.weight == float(weight)
    assert type(update.weight) is float


@pytest.mark.parametrize(
    "weight",
    [-1, -1e-300, math.nan, math.inf, -math.inf, "5", None, True, [1], 1j, 10**400, np.nan],
)
def test_what_is_no_weight_is_refused(weight: Any) -> None:
    with pytest.raises(InvalidInput, match="not a weight") as caught:
        ClientUpdate(make_adapter(), weight, "c7")
    assert (caught.value.client, caught.value.field) == ("c7", "weight")
    assert caught.value.expected


def test_the_adapters_name_is_the_default(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "7")
    assert ClientUpdate(folder).client_id == "7"
    assert ClientUpdate(str(folder)).client_id == "7"
    assert ClientUpdate.load(folder, 3).weight == 3
    assert ClientUpdate(folder, client_id="x").client_id == "x"
    assert ClientUpdate(make_adapter(name="y")).client_id == "y"


@pytest.mark.parametrize("name", ["", "  ", 7, b"x"])
def test_a_client_needs_a_name(name: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        ClientUpdate(make_adapter(name="y"), 1, name)
    assert caught.value.field == "client_id"


def test_an_adapter_without_a_name_needs_one() -> None:
    with pytest.raises(InvalidInput, match="client_id="):
        ClientUpdate(make_adapter())


@pytest.mark.parametrize("adapter", [None, 3, {"a": torch.ones(1)}])
def test_what_is_no_adapter_is_refused(adapter: Any) -> None:
    with pytest.raises(InvalidInput, match="not an adapter") as caught:
        ClientUpdate(adapter, 1, "c7")
    assert caught.value.client == "c7"


def test_errors_of_the_folder_carry_the_clients_id(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        ClientUpdate(tmp_path / "absent", 1, "hospital-3")
    assert caught.value.client == "hospital-3"
    assert "hospital-3" in str(caught.value)


def test_an_update_cannot_be_changed() -> None:
    update = ClientUpdate(make_adapter(), 1, "c7")
    with pytest.raises(AttributeError):
        update.weight = 2  # type: ignore[misc]


def test_validate_reads_every_number_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ClientUpdate(make_folder(tmp_path / "7"))
    update.validate()
    monkeypatch.setattr(ops, "scan", None)
    update.validate()


def test_validate_tells_a_file_rewritten_in_place_every_time(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "7")
    update = ClientUpdate(folder)
    update.validate()
    rewrite(folder / "adapter_model.safetensors")
    for _ in range(2):
        with pytest.raises(InvalidInput, match="was rewritten"):
            update.validate()


def rewrite(path: Path) -> None:
    """Other numbers in place: the same file, the same length."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80?")
    os.utime(path, ns=(1, 1))


def test_validate_names_the_client() -> None:
    extra = {"base_model.model.score.weight": torch.tensor([math.inf])}
    update = ClientUpdate(make_adapter(extra_tensors=extra, name="a"), 1, "c7")
    for _ in range(2):
        with pytest.raises(InvalidInput, match="NaN or infinite") as caught:
            update.validate()
        assert caught.value.client == "c7"
