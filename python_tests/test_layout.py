"""Layouts: which tensor is what, and where it lies."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from adapters import MODULES, make_adapter, make_config, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastagg.adapter import Adapter
from fastagg.dtypes import DTYPE_CODES
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, TensorSpan, packed
from fastagg.peft_format.safetensors_file import map_file


def test_slots_are_sorted_and_described() -> None:
    layout = make_adapter(rank_pattern={"v_proj": 3}, alpha_pattern={"1.+q_proj": 4}).layout
    assert [slot.module for slot in layout.slots] == sorted(MODULES)
    for slot in layout.slots:
        m, n = MODULES[slot.module]
        rank = 3 if "v_proj" in slot.module else 8
        alpha = 4 if slot.module == "model.layers.1.self_attn.q_proj" else 16
        assert (slot.kind, slot.m, slot.n, slot.rank) == ("linear", m, n, rank)
        assert slot.scaling == alpha / rank
        assert slot.weight_shape == (m, n)
        assert not slot.transposed
        assert slot.a.shape == (rank, n)
        assert slot.b.shape == (m, rank)
        assert slot.a.key == f"base_model.model.{slot.module}.lora_A.weight"
    assert layout.whole == ()


def test_tables_describe_the_flat_buffer() -> None:
    adapter = make_adapter(
        dtype=torch.bfloat16, extra_tensors={"base_model.model.score.weight": torch.ones(2, 3)}
    )
    layout, table = adapter.layout, adapter.layout.spans_table
    assert table.dtype == torch.int64
    assert table.shape == (2 * len(MODULES) + 1, 3)
    codes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    ends = 0
    for span, (offset, count, code) in zip(layout.tensors, table.tolist(), strict=True):
        assert (span.offset, span.count, span.dtype) == (offset, count, codes[code])
        assert offset == ends
        ends += count * codes[code].itemsize
    assert ends == layout.nbytes == adapter.flat.numel() == adapter.nbytes
    assert layout.slot_table.dtype == np.int64
    assert layout.slot_table.tolist() == [
        [slot.a.offset, 1, slot.b.offset, 1, slot.rank, 0] for slot in layout.slots
    ]


def test_the_codes_are_those_of_the_ops() -> None:
    from fastagg import ops

    assert DTYPE_CODES == ops.DTYPE_CODES


def test_equal_clients_share_one_layout(tmp_path: Path) -> None:
    one = Adapter.load(make_folder(tmp_path / "1", seed=1))
    two = Adapter.load(make_folder(tmp_path / "2", seed=2))
    assert one.layout is two.layout
    other = Adapter.load(make_folder(tmp_path / "3", alpha=3))
    assert other.layout != one.layout
    assert make_adapter(seed=1).layout is make_adapter(seed=2).layout


def test_a_fresh_layout_is_what_the_library_would_write(tmp_path: Path) -> None:
    one = make_adapter(dtype=torch.bfloat16, prefix="m.base_model.model.", rank=8)
    extra = make_adapter(extra_tensors={"base_model.model.score.weight": torch.ones(2, 3)})
    ranks = {module: 1 + i for i, module in enumerate(one.modules[1:])}
    scalings = dict.fromkeys(ranks, 0.5)
    layout = Layout.fresh(one.layout.slots, ranks, scalings, whole=extra.layout.whole)
    assert {slot.module: slot.rank for slot in layout.slots} == ranks
    assert {slot.scaling for slot in layout.slots} == {0.5}
    state = {span.key: torch.empty(span.shape, dtype=span.dtype) for span in layout.tensors}
    save_file(state, tmp_path / "x.safetensors")
    flat, spans = map_file(tmp_path / "x.safetensors")
    assert layout.nbytes == flat.numel()
    assert [(s.key, s.offset, s.shape, s.dtype) for s in layout.tensors] == [
        (s.key, s.offset, s.shape, s.dtype) for s in spans.values()
    ]
    assert layout.by_module[one.modules[1]].a.source == layout.by_module[one.modules[1]].a.key


def test_a_fresh_layout_in_another_dtype() -> None:
    adapter = make_adapter(extra_tensors={"base_model.model.score.weight": torch.ones(2, 3)})
    ranks, scalings = (dict.fromkeys(adapter.modules, v) for v in (2, 1.0))
    layout = Layout.fresh(
        adapter.layout.slots, ranks, scalings, dtype=torch.float16, whole=adapter.layout.whole
    )
    assert {span.dtype for span in layout.tensors} == {torch.float16}
    again = Layout.fresh(
        adapter.layout.slots, ranks, scalings, dtype=torch.float16, whole=adapter.layout.whole
    )
    assert layout == again
    assert layout != adapter.layout


spans = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
    max_size=8,
)


@given(spans)
@settings(max_examples=60, deadline=None)
def test_packed_tensors_are_aligned_and_have_no_gap(
    described: list[tuple[list[int], torch.dtype]],
) -> None:
    wanted = [TensorSpan(f"k{i}", -1, tuple(s), d) for i, (s, d) in enumerate(described)]
    placed, nbytes = packed(wanted)
    assert nbytes == sum(span.nbytes for span in wanted)
    end = 0
    for span in placed.values():
        assert span.offset == end
        assert span.offset % span.dtype.itemsize == 0
        end += span.nbytes


def test_a_layout_of_224_modules_is_quick(tmp_path: Path) -> None:
    modules = {
        f"model.layers.{layer}.{name}_proj": (8, 8)
        for layer in range(32)
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    pattern = {f"^{module}": 4 for module in modules}
    config = AdapterConfig.from_dict(make_config(modules, rank_pattern=pattern))
    ranks, scalings = (dict.fromkeys(modules, v) for v in (4, 1.0))
    ranks[next(iter(modules))] = 5
    raw = config.with_ranks(ranks, scalings).raw
    first, again = [], []
    for alpha in range(1, 4):
        folder = make_folder(
            tmp_path / str(alpha),
            modules,
            rank=4,
            rank_pattern={f"^{next(iter(modules))}": 5},
            config_extra={**raw, "lora_alpha": alpha},
        )
        for times in (first, again):
            begin = time.perf_counter()
            assert len(Adapter.load(folder).modules) == 224
            times.append(time.perf_counter() - begin)
    assert min(first) < 0.05
    assert min(again) < 0.01


def test_the_dtype_of_a_layout() -> None:
    for dtypes, expected in (
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.float16), torch.float32),
    ):
        tensors = {
            f"base_model.model.q.lora_{which}.weight": torch.zeros(shape, dtype=dtype)
            for which, shape, dtype in zip("AB", ((2, 3), (4, 2)), dtypes, strict=True)
        }
        adapter = Adapter(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2,
                                    "target_modules": ["q"]})
        assert adapter.layout.dtype == expected
