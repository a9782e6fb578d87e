"""Tensors as Flower's arrays and back, to the bit.

Flower carries ``.npy`` bytes, and numpy has no bfloat16: Flower's ``Array`` of such a tensor raises.
Here it travels as the integers of its bits under its own ``dtype`` and an ``stype`` of FastAgg's, so
that Flower's ``Array.numpy()`` refuses it instead of taking the integers for numbers. All other tensors
are what Flower would have made of them, for whoever reads them without FastAgg.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fastagg.errors import InvalidInput, short

__all__ = ["decode", "encode", "from_array", "from_npy", "npy_of", "to_array", "to_npy", "unwarned"]

# Flower's own name for .npy bytes, and ours for those of which numpy does not know the dtype.
_NUMPY = "numpy.ndarray"
_BITS = "fastagg.bits"

# What travels as integers of the same width.
_AS_INTEGERS = {
    "bfloat16": (torch.bfloat16, torch.int16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.int8),
    "float8_e5m2": (torch.float8_e5m2, torch.int8),
}
_INTEGERS_OF = {dtype: (name, bits) for name, (dtype, bits) in _AS_INTEGERS.items()}
_TORCH = {
    np.dtype(name): getattr(torch, name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}
_NUMPY_OF = {dtype: own for own, dtype in _TORCH.items()}

# What numpy writes into a header, of arrays of numbers.
_FIELDS = re.compile(
    rb"^.{10,12}\{'descr': '([<>|][a-zA-Z][1-9]\d?)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:SIZE, ?)*(?:SIZE)?)\), \} *\n$".replace(b"SIZE", rb"(?:0|[1-9]\d{0,17})"),
    re.DOTALL,
)
_LONGEST_HEADER = 10_000


def encode(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """A state dict as a record: tensors of any dtype and device, each copied once.

    Raises:
        InvalidInput: a tensor of a dtype that cannot be sent, or one without data.
    """
    record = ArrayRecord()
    for key, tensor in tensors.items():
        data, name = to_npy(tensor, key)
        stype = _BITS if tensor.dtype in _INTEGERS_OF else _NUMPY
        record[key] = Array(dtype=name, shape=tuple(tensor.shape), stype=stype, data=data)
    return record


def decode(record: Mapping[str, Array], client: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a record: views of its bytes, which are not to be written to.

    Nothing is copied; O(1) for each tensor.

    Raises:
        InvalidInput: an array that is damaged, or no tensor, naming ``client`` and the key.
    """
    with unwarned():
        return {key: _decoded(key, array, client) for key, array in record.items()}


def to_npy(tensor: torch.Tensor, key: str = "tensor") -> tuple[bytes, str]:
    """The ``.npy`` bytes of a tensor, and the name of its dtype.

    Raises:
        InvalidInput: as :func:`encode`.
    """
    array, name = to_array(tensor, key)
    return npy_of(array), name


def npy_of(array: np.ndarray[Any, Any]) -> bytes:
    """The ``.npy`` bytes of a contiguous array: the numbers are copied once."""
    return b"".join((_header(array.dtype.str, array.shape), array.data))


def to_array(tensor: torch.Tensor, key: str = "tensor") -> tuple[np.ndarray[Any, Any], str]:
    """A tensor as numpy's array, of the integers of its bits where numpy has not its dtype, and the name
    of its dtype; a view where it lies on the CPU.

    Raises:
        InvalidInput: as :func:`encode`.
    """
    name, bits = _INTEGERS_OF.get(tensor.dtype, (None, tensor.dtype))
    if bits not in _NUMPY_OF or tensor.is_meta or tensor.layout != torch.strided:
        raise InvalidInput(
            "this tensor cannot be sent",
            field=key,
            expected="a dense tensor with data, of a dtype of numpy's, bfloat16 or float8",
            got=f"{tensor.layout}, {tensor.dtype}, on {tensor.device}",
        )
    array = tensor.detach().cpu().contiguous().view(bits).numpy()
    return array, name or str(array.dtype)


def from_array(
    array: np.ndarray[Any, Any], dtype: str, *, key: str = "tensor", client: str | None = None
) -> torch.Tensor:
    """The tensor of which :func:`to_array` made an array and the name of a dtype; a view.

    Raises:
        InvalidInput: an array of another dtype.
    """
    if not isinstance(array, np.ndarray) or array.dtype not in _TORCH:
        raise _damaged(key, client, f"torch has no {getattr(array, 'dtype', type(array).__name__)}")
    return _restored(torch.from_numpy(array), dtype, key, client)


def from_npy(
    data: bytes, dtype: str | None = None, *, key: str = "tensor", client: str | None = None
) -> torch.Tensor:
    """The tensor of ``.npy`` bytes: a view of them, or a copy of a big-endian or transposed array.

    Args:
        dtype: the name of the tensor's own, where the bytes hold the integers of its bits; None: theirs.

    Raises:
        InvalidInput: not such bytes, or cut off.
    """
    if not isinstance(data, bytes):
        raise _damaged(key, client, f"{type(data).__name__} instead of bytes")
    found = _parsed(data[: _header_length(data)])
    if found is None:
        raise _damaged(key, client, "it does not begin as .npy bytes of numbers do")
    if len(data) != found.length:
        raise _damaged(key, client, f"{len(data)} bytes instead of {found.length}")
    if found.own is None:
        raise _damaged(key, client, f"torch has no {found.dtype}")
    if found.fortran or not found.dtype.isnative:
        return _restored(_copied(data, found), dtype, key, client)
    if found.length == found.start:
        return _restored(torch.empty(found.shape, dtype=found.own), dtype, key, client)
    values = torch.frombuffer(data, dtype=found.own, offset=found.start).view(found.shape)
    return _restored(values, dtype, key, client)


@contextmanager
def unwarned() -> Iterator[None]:
    """Without torch's warning that bytes cannot be written to: what is read here never is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        yield


def _decoded(key: str, array: Array, client: str | None) -> torch.Tensor:
    if array.stype not in (_NUMPY, _BITS):
        raise _damaged(key, client, f"it is serialised as {short(array.stype)}")
    name = array.dtype if array.stype == _BITS else None
    return from_npy(array.data, name, key=key, client=client)


def _restored(
    values: torch.Tensor, name: str | None, key: str, client: str | None
) -> torch.Tensor:
    """Values, or integers as the numbers of which they are the bits."""
    if name is None or str(values.dtype) == f"torch.{name}":
        return values
    dtype, bits = _AS_INTEGERS.get(name, (None, None))
    if dtype is None or bits != values.dtype:
        raise _damaged(key, client, f"{values.dtype} instead of {short(name)}")
    return values.view(dtype)


@dataclass(frozen=True)
class _Header:
    """What a ``.npy`` header says: where the numbers begin, their shape, order and dtype, the length of
    it all, and torch's dtype for them, None where it has none."""

    start: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int
    own: torch.dtype | None


def _copied(data: bytes, header: _Header) -> torch.Tensor:
    array = np.frombuffer(data, dtype=header.dtype, offset=header.start)
    array = array.reshape(header.shape, order="F" if header.fortran else "C")
    return torch.from_numpy(np.array(array, dtype=header.dtype.newbyteorder("="), order="C"))


def _header_length(data: bytes) -> int:
    """Where the numbers begin, by what follows magic and version; 0 where these are others."""
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(data[:8])
    if width is None:
        return 0
    return 8 + width + min(int.from_bytes(data[8 : 8 + width], "little"), _LONGEST_HEADER)


# The modules of a model have few shapes: a header is written, and parsed, once for each.
@functools.lru_cache(maxsize=1024)
def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


@functools.lru_cache(maxsize=1024)
def _parsed(header: bytes) -> _Header | None:
    """What a header says; None where it is none.

    numpy's own reader evaluates it as Python, and fails in as many ways as that can.
    """
    found = _FIELDS.search(header)
    if found is None:
        return None
    try:
        dtype = np.dtype(found[1].decode())
    except TypeError:
        return None
    shape = tuple(int(size) for size in found[3].split(b",") if size.strip())
    length = len(header) + math.prod(shape) * dtype.itemsize
    own = _TORCH.get(dtype.newbyteorder("="))
    return _Header(len(header), shape, found[2] == b"True", dtype, length, own)


def _damaged(key: str, client: str | None, problem: str) -> InvalidInput:
    return InvalidInput(
        f"this array is not a tensor's: {problem}",
        client=client,
        field=key,
        expected="what encode() or Flower's Array makes of a tensor",
    )
