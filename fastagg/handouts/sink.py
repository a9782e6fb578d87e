"""Where hand-outs go: a buffer in memory, or a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from fastagg.peft_format.safetensors_file import header_bytes

__all__ = ["FileSink", "MemorySink", "Sink"]


class Sink(Protocol):
    """The tensors of one adapter, to be put in any order."""

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Writes bytes (1-D uint8, on the CPU) at an offset in the adapter's flat buffer."""


class MemorySink:
    """A flat buffer in memory."""

    def __init__(self, nbytes: int) -> None:
        self.flat = torch.empty(nbytes, dtype=torch.uint8)

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Copies the bytes."""
        self.flat[offset : offset + data.numel()].copy_(data)


class FileSink:
    """A new safetensors file, its room reserved from the start.

    Buffered writes are several times faster here than filling a mapping, which takes a page fault
    every 4 KiB.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], nbytes: int
    ) -> None:
        header = header_bytes(entries, {"format": "pt"})
        self._start = len(header)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, len(header) + nbytes)
            _write_all(self._descriptor, memoryview(header), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def put(self, offset: int, data: torch.Tensor) -> None:
        """Writes the bytes."""
        _write_all(self._descriptor, data.numpy().data, self._start + offset)

    def commit(self) -> None:
        """Brings the file to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Lets the file go, finished or not."""
        os.close(self._descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
