"""Where hand-outs go: a buffer in memory, or a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from fastagg.peft_format.safetensors_file import data_start, header_bytes

__all__ = ["FileSink", "MemorySink", "Sink"]


class Sink(Protocol):
    """The tensors of one adapter, to be put in any order."""

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Writes bytes (1-D uint8, on the CPU) at an offset in the adapter's flat buffer."""


class MemorySink:
    """A flat buffer in memory."""

    def __init__(self, nbytes: int) -> None:
        self.flat = torch.zeros(nbytes, dtype=torch.uint8)

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Copies the bytes."""
        self.flat[offset : offset + data.numel()].copy_(data)


class FileSink:
    """A safetensors file, its room reserved from the start.

    Buffered writes are several times faster here than filling a mapping, which takes a page fault
    every 4 KiB. The file is opened for each write: a thousand of these hold no descriptor.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._start = data_start(file.read(8))

    @classmethod
    def create(
        cls, path: Path, entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], nbytes: int
    ) -> FileSink:
        """Makes the file; several processes may write to it then, each its own tensors."""
        header = header_bytes(entries, {"format": "pt"})
        with _opened(path, os.O_CREAT | os.O_EXCL) as descriptor:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, len(header) + nbytes)
            _write_all(descriptor, memoryview(header), 0)
        return cls(path)

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Writes the bytes."""
        with _opened(self._path) as descriptor:
            _write_all(descriptor, data.numpy().data, self._start + offset)

    def commit(self) -> None:
        """Brings the file to the disk."""
        with _opened(self._path) as descriptor:
            os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
