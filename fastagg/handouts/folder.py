"""Hand-outs on disk: a folder of adapters that PEFT loads, written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastagg.distributed.share import Share
from fastagg.errors import InvalidInput, RankLost
from fastagg.handouts.sink import FileSink
from fastagg.handouts.target import Target
from fastagg.peft_format.adapter_folder import WEIGHTS_NAME, new_folder, write_synced
from fastagg.peft_format.config import CONFIG_NAME
from fastagg.peft_format.output_folder import check_free, check_room

__all__ = ["CLIENTS_NAME", "REPORT_NAME", "HandoutFolder", "handout_folder", "shared_folder"]

CLIENTS_NAME = "clients.json"
REPORT_NAME = "report.json"


class HandoutFolder:
    """A folder in the making; ``sinks`` are the files of its targets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_written = 0
        self.sinks: list[FileSink] = []

    def create(self, targets: Sequence[Target]) -> None:
        """Makes the files of the targets, their tensors left open."""
        for target in targets:
            folder = self.path / target.name
            folder.mkdir()
            self._write(folder / CONFIG_NAME, target.config.file_text)
            entries = {span.key: (span.dtype, span.shape) for span in target.layout.tensors}
            self.sinks.append(
                FileSink.create(folder / WEIGHTS_NAME, entries, target.layout.nbytes)
            )

    def commit(self) -> None:
        """Brings the adapters to the disk."""
        for sink in self.sinks:
            sink.commit()
        self.bytes_written += sum(
            (self.path / name).stat().st_size for name in self.path.glob(f"*/{WEIGHTS_NAME}")
        )

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds a JSON file."""
        self._write(self.path / name, json.dumps(value, indent=2, allow_nan=False))

    def _write(self, path: Path, text: str) -> None:
        data = (text + "\n").encode()
        write_synced(path, [data])
        self.bytes_written += len(data)


@contextmanager
def handout_folder(
    folder: str | os.PathLike[str], targets: Sequence[Target], *, force: bool
) -> Iterator[HandoutFolder]:
    """A folder with a file for each target, which takes its name when the block succeeds.

    An exception in the block, Ctrl-C included, leaves nothing behind, and what was there as it was.

    Raises:
        InvalidInput: the folder exists and ``force`` is not set.
        FastAggError: the disk has not the room.
    """
    check_free(folder, force=force)
    check_room(folder, sum(target.layout.nbytes for target in targets))
    with new_folder(Path(folder), overwrite=force) as path:
        made = HandoutFolder(path)
        made.create(targets)
        yield made


class FolderOfAnother(HandoutFolder):
    """The same folder in a process that did not make it: a place for its tensors, and nothing else."""

    def __init__(self, path: Path, targets: Sequence[Target]) -> None:
        super().__init__(path)
        if not path.is_dir():
            raise InvalidInput(
                "this process does not see the folder that the first is about to write",
                field="out",
                expected=str(path),
                cure="Write to a file system that all processes share",
            )
        self.sinks = [FileSink(path / target.name / WEIGHTS_NAME) for target in targets]

    def commit(self) -> None:
        """Leaves it to the maker, who waits for the tensors first."""

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Leaves it to the maker."""


@contextmanager
def shared_folder(
    folder: str | os.PathLike[str], targets: Sequence[Target], share: Share, *, force: bool
) -> Iterator[HandoutFolder]:
    """:func:`handout_folder` for the processes of a round: one makes it, all put their tensors there.

    The block succeeds in all or in none. Where the maker dies the others remove what it had begun;
    parents that it had made for it stay.

    Raises:
        InvalidInput, FastAggError: as there; or a process does not see the maker's files.
    """
    path: Path | None = None
    try:
        with share.agreeing(), ExitStack() as opened:
            made = None
            with share.agreeing():
                if share.first:
                    made = opened.enter_context(handout_folder(folder, targets, force=force))
            path = share.gather(None if made is None else made.path)[0]
            assert path is not None
            with share.agreeing():
                out = made or FolderOfAnother(path, targets)
            yield out
    except RankLost as lost:
        if path is not None and not share.first and 0 in lost.ranks:
            shutil.rmtree(path, ignore_errors=True)
        raise
