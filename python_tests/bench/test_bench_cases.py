"""The named cases are the models and the clients of the papers that they are named after."""

from __future__ import annotations

import pytest

from fastagg.bench.cases import CASES, SERIES, select
from fastagg.errors import InvalidInput

FLORA = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]


def shapes(name: str) -> dict[str, tuple[int, int]]:
    return {p.name.split(".")[-1]: (p.m, p.n) for p in CASES[name].projections}


def llama(hidden: int, key_value: int, inner: int) -> dict[str, tuple[int, int]]:
    """out x in of the seven projections of a Llama's layer."""
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("tinyllama-qv-10", 22, {"q_proj": (2048, 2048), "v_proj": (256, 2048)}),
        ("llama7b-qv-10", 32, {"q_proj": (4096, 4096), "v_proj": (4096, 4096)}),
        ("flexlora-1.3b-80", 24, llama(2048, 2048, 5504)),
        ("llama7b-all-10", 32, llama(4096, 4096, 11008)),
        ("llama7b-all-100", 32, llama(4096, 4096, 11008)),
        ("llama70b-layer-10", 1, llama(8192, 1024, 28672)),
    ],
)
def test_models(name: str, layers: int, expected: dict[str, tuple[int, int]]) -> None:
    case = CASES[name]
    assert case.name == name
    assert case.layers == layers
    assert shapes(name) == expected
    assert case.modules == layers * len(expected)
    assert case.clients == int(name.rsplit("-", 1)[1])
    assert all(len(p.ranks) == case.clients for p in case.projections)


@pytest.mark.parametrize(
    "name", ["tinyllama-qv-10", "llama7b-qv-10", "llama7b-all-10", "llama70b-layer-10"]
)
def test_floras_clients(name: str) -> None:
    case = CASES[name]
    assert all(list(p.ranks) == FLORA for p in case.projections)
    assert (case.rows, case.rank) == (160, 64)


def test_ten_times_floras_clients() -> None:
    case = CASES["llama7b-all-100"]
    assert all(sorted(p.ranks) == sorted(FLORA * 10) for p in case.projections)
    assert case.rows == 1600


def test_flexloras_clients() -> None:
    """Ranks between 8 and 200, most of them small, and of one client not the same in all projections."""
    case = CASES["flexlora-1.3b-80"]
    for projection in case.projections:
        assert min(projection.ranks) == 8
        assert max(projection.ranks) == 200
        assert sum(rank == 8 for rank in projection.ranks) > 0.8 * case.clients
    assert len({p.ranks for p in case.projections}) == 2
    assert case.rank == 200


def test_entries_of_a_layer() -> None:
    """By hand: q is 2048 x 2048, v 256 x 2048, R = 160."""
    assert CASES["tinyllama-qv-10"].elements_per_layer == 160 * (2048 + 2048 + 256 + 2048)


def test_squares() -> None:
    sizes = [256, 512, 1024, 2048, 4096, 8192]
    assert list(SERIES["square"].values) == sizes
    for size, case in zip(sizes, SERIES["square"].cases, strict=True):
        assert CASES[f"square-{size}"] is case
        assert [(p.m, p.n, list(p.ranks)) for p in case.projections] == [(size, size, FLORA)]
        assert case.modules == 1


@pytest.mark.parametrize(("series", "quantity"), [("ranks", "rows"), ("clients", "clients")])
def test_series_grow_in_what_they_say(series: str, quantity: str) -> None:
    found = SERIES[series]
    assert [getattr(case, quantity) for case in found.cases] == list(found.values)
    assert list(found.values) == sorted(set(found.values))
    others = {(p.m, p.n) for case in found.cases for p in case.projections}
    assert others == {(2048, 2048)}


def test_names_are_unique() -> None:
    named = [name for name in CASES if name != CASES[name].name]
    in_series = sum(len(series.cases) for series in SERIES.values())
    assert named == []
    assert len(CASES) == 6 + in_series


def test_select_by_name_and_by_pattern_each_once() -> None:
    names = [case.name for case in select(["square-512", "llama7b-*", "square-*", "square-512"])]
    assert names[:4] == ["square-512", "llama7b-qv-10", "llama7b-all-10", "llama7b-all-100"]
    assert sorted(names[4:]) == sorted(f"square-{n}" for n in (256, 1024, 2048, 4096, 8192))


@pytest.mark.parametrize("pattern", ["square-257", "Square-256", "squares-*", ""])
def test_select_names_what_fits_nothing(pattern: str) -> None:
    with pytest.raises(InvalidInput, match="there is no such case") as caught:
        select(["square-256", pattern])
    assert caught.value.field == "--case"
    assert repr(pattern) in str(caught.value)
    assert "tinyllama-qv-10" in str(caught.value)
