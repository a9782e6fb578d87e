"""Safetensors files, mapped: read without loading them, and written in place.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header,
then the tensors' bytes without a gap. The library parses and validates; here is only the mapping.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import TensorSpan

__all__ = ["MappedFile", "MappedWriter", "map_file"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RENAME = "Write new files beside the old ones and rename them into place"
_PREFIX_BYTES = 8
# The data block starts at a multiple of this, so that the widest vector loads are aligned.
_ALIGNMENT = 64
# The limit of the safetensors library itself.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A safetensors file mapped copy-on-write; make it with :meth:`open`.

    Attributes:
        flat: 1-D uint8 CPU tensor over the data block; writing into it never reaches the file.
        spans: the tensors by key, in the order of their offsets.
        header: the header's bytes, which fix the spans.
        path, identity: the file, to notice when it is rewritten.
    """

    flat: torch.Tensor
    spans: Mapping[str, TensorSpan]
    header: bytes
    path: Path
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, client: str | None = None) -> MappedFile:
        """Maps a file; costs its header, whatever its size. Errors as in :func:`map_file`."""
        path = Path(path)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a regular file")
            with path.open("rb") as file:
                header = _read_header(file, status.st_size, path, client)
            start, identity = _PREFIX_BYTES + len(header), _identity(status)
            spans = _parsed(path, header, client)
            # Unlike mmap.mmap, this keeps no file descriptor: clients may number thousands.
            mapped = torch.from_file(
                str(path), shared=False, size=status.st_size, dtype=torch.uint8
            )
            settled = _identity(os.stat(path)) == identity
        except (OSError, RuntimeError) as error:
            raise InvalidInput(
                f"cannot map {path}: {getattr(error, 'strerror', None) or error}",
                client=client,
                cure="Check that the file exists and may be read",
            ) from error
        if not settled:
            raise InvalidInput(
                f"{path} changed while it was being opened", client=client, cure=_RENAME
            )
        return cls(mapped[start:], spans, header, path, identity)

    @property
    def aligned(self) -> bool:
        """Whether every tensor starts at a multiple of its element's size in memory."""
        start = self.flat.data_ptr()
        return all((start + s.offset) % s.dtype.itemsize == 0 for s in self.spans.values())

    def check_unchanged(self, client: str | None = None) -> None:
        """Raises InvalidInput where the file was rewritten in place since it was mapped.

        One that was *replaced* (renamed over, or removed) is fine: the mapping keeps the old.
        """
        try:
            now = _identity(os.stat(self.path))
        except OSError:
            return
        if now[:2] == self.identity[:2] and now != self.identity:
            raise InvalidInput(
                f"{self.path} was rewritten while it was in use",
                client=client,
                expected=f"the {self.identity[2]} bytes that were there when it was opened",
                got=f"{now[2]} bytes, modified since",
                cure=_RENAME,
            )


def map_file(
    path: str | os.PathLike[str], *, client: str | None = None
) -> tuple[torch.Tensor, Mapping[str, TensorSpan]]:
    """Maps a safetensors file copy-on-write; costs its header, whatever its size.

    Returns:
        The data block as a 1-D uint8 CPU tensor, and its tensors by key in the order of offsets.

    Raises:
        InvalidInput: no such file, not a safetensors file, cut off, or a header that does not
            describe the data (offsets outside the file, overlapping, with gaps; unknown dtypes).
    """
    file = MappedFile.open(path, client=client)
    return file.flat, file.spans


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _read_header(file: Any, size: int, path: Path, client: str | None) -> bytes:
    raw = file.read(_PREFIX_BYTES)
    length = int.from_bytes(raw, "little")
    if len(raw) < _PREFIX_BYTES or length > min(size - _PREFIX_BYTES, _MAX_HEADER):
        raise _damaged(
            path,
            client,
            "the file is cut off or is not a safetensors file",
            expected=f"a header of {length} bytes" if len(raw) == _PREFIX_BYTES else "a header",
            got=f"a file of {size} bytes",
        )
    header: bytes = file.read(length)
    return header


def _parsed(path: Path, header: bytes, client: str | None) -> dict[str, TensorSpan]:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header against the file: dtypes, shapes, offsets without gap or
        # overlap from the first byte to the last. What it accepts can be read as plain JSON.
        with safe_open(path, framework="pt"):
            pass
        fields = json.loads(header, object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise _damaged(path, client, f"its header does not describe its data: {error}") from error
    fields.pop("__metadata__", None)
    spans = {}
    for key, info in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
        if info["dtype"] not in _DTYPES:
            raise _damaged(
                path,
                client,
                f"tensor {key!r} has a dtype that cannot be read",
                expected=", ".join(_DTYPES),
                got=info["dtype"],
                cure="Cast it to float32 and save the file again",
            )
        offset, shape = info["data_offsets"][0], tuple(info["shape"])
        spans[key] = TensorSpan(key, offset, shape, _DTYPES[info["dtype"]], key)
    return spans


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _damaged(
    path: Path,
    client: str | None,
    problem: str,
    *,
    expected: object = None,
    got: object = None,
    cure: str = "Copy the file again from the client, or have it save the adapter again",
) -> InvalidInput:
    return InvalidInput(f"{path}: {problem}", client=client, expected=expected, got=got, cure=cure)


def header_bytes(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Length and header of a safetensors file that holds the entries in this order, packed."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, (dtype, shape) in entries.items():
        end = offset + TensorSpan(key, offset, tuple(shape), dtype).nbytes
        fields[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + _PREFIX_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def data_start(beginning: bytes) -> int:
    """Where the tensors of a whole file begin, by its first eight bytes."""
    return _PREFIX_BYTES + int.from_bytes(beginning[:_PREFIX_BYTES], "little")


class MappedWriter:
    """A safetensors file that is filled in place through ``flat``; see :meth:`create`.

    As a context manager it commits on success and leaves the unfinished file otherwise: the caller
    writes beside the final name and renames.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorSpan], header: bytes) -> None:
        nbytes = sum(span.nbytes for span in entries.values())
        self.path = path
        self.spans = entries
        self.nbytes = nbytes
        with path.open("x+b") as file:
            file.write(header)
            file.flush()
            _reserve(file.fileno(), len(header) + nbytes)
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
        self.flat = torch.frombuffer(self._map, dtype=torch.uint8)[len(header) :]

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> MappedWriter:
        """Makes the file with its header and reserves the room for its data.

        Args:
            path: must not exist yet.
            entries: key -> (dtype, shape); wide dtypes go first in the file, so all are aligned.
            metadata: text -> text, for ``__metadata__``.

        Raises:
            FileExistsError: the path exists.
            OSError: no room on the disk, found out before anything is written.
        """
        ordered = dict(sorted(entries.items(), key=lambda item: -item[1][0].itemsize))
        spans, offset = {}, 0
        for key, (dtype, shape) in ordered.items():
            spans[key] = TensorSpan(key, offset, tuple(shape), dtype, key)
            offset += spans[key].nbytes
        return cls(Path(path), spans, header_bytes(ordered, metadata))

    def tensor(self, key: str) -> torch.Tensor:
        """A writable view of one tensor."""
        return view(self.flat, self.spans[key])

    def commit(self) -> None:
        """Brings the data to the disk and gives ``flat`` up; the file may then be renamed."""
        if self._map is None:
            return
        self._map.flush()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self._map = None
        self.flat = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> MappedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()


def view(flat: torch.Tensor, span: TensorSpan) -> torch.Tensor:
    """A tensor of the flat buffer: a view, or a copy where the bytes are not aligned."""
    data = flat[span.offset : span.offset + span.nbytes]
    if span.count == 0:
        return torch.empty(span.shape, dtype=span.dtype)
    if data.data_ptr() % span.dtype.itemsize or data.storage_offset() % span.dtype.itemsize:
        data = data.clone()
    return data.view(span.dtype).view(span.shape)


def _reserve(descriptor: int, size: int) -> None:
    # Writing through a mapping into a full disk kills the process; reserved blocks cannot fail.
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
