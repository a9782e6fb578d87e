"""Tensors as Flower's arrays and back: the same bits, whatever the dtype; damaged ones are refused."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from adapters import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord
from node_grid import carried_record

from fastagg.engines.flower import decode, encode
from fastagg.engines.flower.codec import from_array, from_npy, to_array, to_npy
from fastagg.errors import InvalidInput

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, those of NaN and infinity among them."""
    tensor = torch.empty(shape, dtype=dtype)
    top = 2 if dtype == torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, top, tensor.nbytes, dtype=np.uint8)
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_tensors_without_numbers_keep_their_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = decode(carried_record(encode({"a": torch.empty(shape, dtype=dtype)})))["a"]
    assert (found.shape, found.dtype) == (shape, dtype)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), shapes, st.integers(0, 2**32 - 1), st.booleans())
def test_tensors_come_back_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, turned: bool
) -> None:
    tensor = drawn(shape, dtype, seed)
    if turned:
        tensor = tensor.permute(tuple(reversed(range(tensor.ndim))))
    tensors = {"a": tensor, "b": drawn((3,), dtype, seed + 1)}
    assert same_bits(decode(carried_record(encode(tensors))), tensors)
    array, name = to_array(tensor)
    assert same_bits({"a": from_array(array, name)}, {"a": tensor})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32, torch.bool])
def test_flower_reads_what_numpy_knows_and_the_other_way_round(dtype: torch.dtype) -> None:
    tensor = drawn((3, 4), dtype, 1)
    theirs, ours = Array(tensor.numpy()), encode({"a": tensor})["a"]
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (
        theirs.dtype,
        theirs.shape,
        theirs.stype,
        theirs.data,
    )
    assert same_bits(decode(ArrayRecord({"a": theirs})), {"a": tensor})


def test_flower_does_not_take_the_bits_of_a_bfloat16_for_numbers() -> None:
    record = encode({"a": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(TypeError, match="fastagg"):
        record["a"].numpy()
    with pytest.raises(TypeError):
        ArrayRecord({"a": torch.ones(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.float16),
    ],
)
def test_arrays_of_others_are_read_in_whatever_order_they_come(array: np.ndarray) -> None:
    found = decode(ArrayRecord({"a": Array(array)}))["a"]
    assert found.shape == array.shape and np.array_equal(found.numpy(), array)


def test_nothing_is_copied() -> None:
    record = encode({"a": drawn((64, 64), torch.bfloat16, 0), "b": drawn((8, 8), torch.float32, 0)})
    for key, tensor in decode(record).items():
        data = np.frombuffer(record[key].data, np.uint8)
        start, nbytes = data.ctypes.data, data.nbytes
        assert start < tensor.data_ptr() < start + nbytes
        assert tensor.data_ptr() + tensor.nbytes == start + nbytes


def test_reading_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    decode(encode({"a": torch.ones(3)}))
    assert not recwarn.list


def test_a_size_is_written_as_numpy_writes_it() -> None:
    whole, _ = to_npy(drawn((3, 5), torch.float32, 0))
    with pytest.raises(InvalidInput, match="begin"):
        from_npy(whole.replace(b"(3, 5)", b"(3,05)"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_what_they_then_say(data: st.DataObject) -> None:
    whole, _ = to_npy(drawn((3, 5), torch.float32, 0))
    kind = data.draw(st.sampled_from(["cut", "changed", "longer", "noise"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "longer":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "noise":
        damaged = data.draw(st.binary(max_size=200))
    else:
        place = data.draw(st.integers(0, 127))
        damaged = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    found = None
    with contextlib.suppress(InvalidInput):
        found = from_npy(damaged, key="w", client="ann")
    if found is not None:
        assert kind == "changed"
        again = np.lib.format.read_array(io.BytesIO(damaged), allow_pickle=False)
        again = again.astype(again.dtype.newbyteorder("="))
        assert same_bits({"w": found}, {"w": torch.from_numpy(again)})


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x07\x00" + b"v" * 200), "begin"),
        (Array("float32", (2,), "pickle", b"\x80\x04."), "pickle"),
        (Array(np.array(["text"])), "torch has no"),
        (Array(np.zeros(3, np.complex64)), "torch has no"),
        (Array(np.array(["text"]).astype(">U4")), "torch has no"),
        (Array(np.asfortranarray(np.zeros((2, 2), ">u4"))), "torch has no"),
        (Array("bfloat16", (2,), "fastagg.bits", Array(np.zeros(2, np.float32)).data), "instead of"),
        (Array("float7", (2,), "fastagg.bits", Array(np.zeros(2, np.int16)).data), "float7"),
    ],
)
def test_what_is_no_tensor_is_refused(array: Array, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        decode({"w": array}, "ben")
    assert (caught.value.client, caught.value.field) == ("ben", "w")


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)],
)
def test_what_cannot_be_sent_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="lora_A"):
        encode({"lora_A": tensor})
