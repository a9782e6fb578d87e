"""Where a folder may be written; :func:`fastagg.peft_format.adapter_folder.new_folder` writes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fastagg.byte_sizes import format_bytes
from fastagg.errors import FastAggError, InvalidInput

__all__ = ["check_free", "check_room"]


def check_free(
    target: str | os.PathLike[str], *, force: bool, reading: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Whether a folder may be written at `target`, found out before any work.

    Args:
        target: where the folder is to be.
        force: an existing folder may be replaced.
        reading: folders that are read, which the new one may neither be nor hold nor lie in.

    Raises:
        InvalidInput: something is there, or writing it would destroy what is read.
    """
    path = Path(target)
    place = path.resolve()
    for folder in reading:
        read = Path(folder).resolve()
        if place == read or place in read.parents or read in place.parents:
            raise InvalidInput(
                f"{path} overlaps {folder}, which is read",
                field="out",
                cure="Write somewhere else",
            )
    there = next(held for held in (place, *place.parents) if held.exists())
    if not there.is_dir():
        raise InvalidInput(f"{there} is no folder", field="out", cure="Write somewhere else")
    if place.exists() and not force:
        raise InvalidInput(f"{path} exists", field="out", cure="Replace it with --force (force=True)")


def check_room(target: str | os.PathLike[str], needed: int) -> None:
    """Whether the disk under `target` has room for `needed` bytes.

    Raises:
        FastAggError: it has not.
    """
    place = Path(target).absolute()
    disk = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise FastAggError(
            f"{target} needs {format_bytes(needed)}, and its disk has {format_bytes(free)} left"
        )
