"""The plan's tables against a plain loop over clients and slots."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from equations import SHAPES, client, one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from fastagg import _host
from fastagg.planning.plan import ModuleIndex, WeightTotals, padded, stream_of
from fastagg.planning.roster import Member


def build(tables, modules, scales, bucket, place, lengths):
    as_array = [np.array(values, dtype=np.int64) for values in (bucket, place, lengths)]
    return _host.build_plan(
        [np.array(table, dtype=np.int64).reshape(-1, 6) for table in tables],
        [np.array(numbers, dtype=np.int64) for numbers in modules],
        [np.array(scale, dtype=np.float64) for scale in scales],
        *as_array,
    )


@given(seed=st.integers(0, 2**31), clients=st.integers(0, 6), buckets=st.integers(1, 3))
def test_tables_equal_those_of_a_plain_loop(seed: int, clients: int, buckets: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randrange(4) for _ in range(buckets)]
    bucket = [b for b, length in enumerate(lengths) for _ in range(length)]
    place = [j for length in lengths for j in range(length)]
    numbers = list(range(len(bucket)))
    tables, modules, scales = [], [], []
    for _ in range(clients):
        have = draw.sample(numbers, draw.randint(0, len(numbers)))
        have += [-1] * draw.randrange(2)
        draw.shuffle(have)
        modules.append(have)
        tables.append([[draw.randrange(99) for _ in range(4)] + [draw.randrange(9), 0]
                       for _ in have])
        scales.append([draw.random() for _ in have])
    found = build(tables, modules, scales, bucket, place, lengths)
    assert len(found) == buckets
    for b, (slots, scale, first, ranks) in enumerate(found):
        rows, expected_scale, counts, used = [], [], [0] * lengths[b], [0] * lengths[b]
        for j in range(lengths[b]):
            number = next(m for m in numbers if bucket[m] == b and place[m] == j)
            for k in range(clients):
                for slot, module in enumerate(modules[k]):
                    if module == number:
                        a_offset, a_dtype, b_offset, b_dtype, rank, _ = tables[k][slot]
                        rows.append([j, used[j], rank, k, a_offset, a_dtype, k, b_offset, b_dtype])
                        expected_scale.append(scales[k][slot])
                        counts[j] += 1
                        used[j] += rank
        assert slots.shape == (len(rows), 9)
        assert slots.tolist() == rows
        assert scale.tolist() == expected_scale
        assert first.tolist() == np.cumsum([0, *counts]).tolist()
        assert ranks.tolist() == used


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": [[5]]}, "module number 5 is unknown"),
        ({"modules": [[-2]]}, "module number -2 is unknown"),
        ({"modules": [[0, 0]]}, "one entry for each"),
        ({"scales": [[]]}, "one entry for each"),
        ({"scales": []}, "one entry for each client"),
        ({"tables": [[0, 0, 0, 0, -1, 0]]}, "rank is negative"),
        ({"lengths": [0]}, "outside its bucket"),
        ({"bucket": [1]}, "outside its bucket"),
        ({"place": [-1]}, "outside its bucket"),
        ({"lengths": [-1]}, "negative length"),
    ],
)
def test_wrong_tables_are_refused(change, message: str) -> None:
    good = {"tables": [[0, 0, 0, 0, 2, 0]], "modules": [[0]], "scales": [[1.0]],
            "bucket": [0], "place": [0], "lengths": [1]}
    build(**good)
    with pytest.raises(ValueError, match=message):
        build(**{**good, **change})


def test_a_plan_of_100_clients_and_224_modules_takes_less_than_20_ms() -> None:
    modules = {f"layers.{i}.{name}": (64 + 8 * (i % 2), 32) for i in range(32)
               for name in ("q", "k", "v", "o", "gate", "up", "down")}
    adapter = client("c", 4, modules=modules).adapter
    index = ModuleIndex.of({slot.module: (slot.m, slot.n) for slot in adapter.layout.slots})
    scale = np.ones(len(modules))
    index.placed(adapter.layout)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        plans = index.plan([adapter.layout] * 100, [scale] * 100)
        times.append(time.perf_counter() - started)
    assert sum(len(plan.slots) for plan in plans) == 22400
    assert min(times) < 0.020


def test_parts_of_a_bucket(seed: int) -> None:
    clients = [client(f"c{k}", rank, seed=seed) for k, rank in enumerate((3, 6, 1))]
    index = ModuleIndex.of(SHAPES)
    layouts = [each.adapter.layout for each in clients]
    scales = [np.full(len(layout.slots), 0.5 + k) for k, layout in enumerate(layouts)]
    for plan in index.plan(layouts, scales):
        count = len(plan.bucket.modules)
        for lo in range(count):
            part = plan.part(lo, count)
            assert part.rows == padded(10) == 16
            assert part.slots[:, 0].min() == 0
            assert part.ranks.tolist() == [10] * (count - lo)
            row = [0.5] * 3 + [1.5] * 6 + [2.5] * 1 + [0.0] * 6
            assert part.coefficients.tolist() == [row] * (count - lo)
            owner = [0] * 3 + [1] * 6 + [2] + [-1] * 6
            assert part.owners.tolist() == [owner] * (count - lo)


def test_runs_skip_modules_without_a_slot_and_keep_to_the_limit() -> None:
    modules = {f"m{i}": (8, 8) for i in range(9)}
    index = ModuleIndex.of(modules)
    have = {name: shape for name, shape in modules.items() if name not in ("m0", "m4")}
    layout = client("c", 8, modules=have).adapter.layout
    (plan,) = index.plan([layout], [np.ones(7)])
    assert list(plan.runs(1 << 20, 4)) == [(1, 4), (5, 9)]
    one = 8 * 16 * 4
    assert list(plan.runs(2 * one, 4)) == [(1, 3), (3, 4), (5, 7), (7, 9)]
    assert list(plan.runs(1, 4)) == [(i, i + 1) for i in (1, 2, 3, 5, 6, 7, 8)]


def test_streams_are_the_modules_own() -> None:
    names = [f"model.layers.{i}.q_proj" for i in range(500)]
    streams = [stream_of(name) for name in names]
    assert len(set(streams)) == 500
    assert all(0 <= stream < 2**63 for stream in streams)
    assert stream_of("model.layers.0.q_proj") == 4122860474111164413
    assert torch.tensor(streams).dtype == torch.int64


def member(name: str, modules: list[str], weight: float) -> Member:
    adapter = client(name, 2, modules=dict.fromkeys(modules, (4, 4))).adapter
    weights = np.full(len(modules), weight)
    return Member(name, weight, adapter.layout, adapter.config, weights, weight)


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@given(data=st.data())
def test_totals_of_any_order_and_any_tree(missing: str, data: st.DataObject) -> None:
    names = ["a", "b", "c"]
    having = data.draw(st.lists(st.sets(st.sampled_from(names), min_size=1), min_size=1,
                                max_size=5))
    members = [member(f"c{k}", sorted(found), 2.0**k) for k, found in enumerate(having)]
    split = data.draw(st.integers(0, len(members)))
    left, right = WeightTotals(missing), WeightTotals(missing)
    for each in members[:split]:
        left.add(each)
    for each in members[split:]:
        right.add(each)
    everything = sum(each.weight for each in members)
    for module, total in left.merged(right).total.items():
        own = sum(each.weight for each in members if module in each.own_modules)
        assert total == (everything if missing == "zero" else own)
