"""Writing the merged checkpoint: tensor by tensor into mapped files, beside, then renamed."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from fastagg.adapter import Adapter
from fastagg.checkpoint.files import Checkpoint
from fastagg.checkpoint.targets import Change, Entry, Targets, Tied
from fastagg.dtypes import DTYPE_CODES, dtype_name
from fastagg.errors import InvalidInput
from fastagg.peft_format.adapter_folder import new_folder
from fastagg.peft_format.output_folder import check_free, check_room
from fastagg.peft_format.safetensors_file import MappedWriter

# done, total, what: bytes of tensors written so far, of all, and the file at hand.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; the sizes are in bytes, the time in seconds."""

    base: str
    out: str
    adapter: str | None
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    untied: bool
    shards: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """The report as a JSON-able dictionary."""
        return dataclasses.asdict(self)


def merge_into_checkpoint(
    base: str | os.PathLike[str],
    change: Adapter | Change | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    tied: Tied = "keep",
    progress: Progress | None = None,
) -> MergeReport:
    """Add an adapter's scaling * B A into a safetensors checkpoint, written as a new one.

    The new folder has the base's shards, keys and dtypes, and its other files. Sums are taken in
    float32 (float64 for float64 weights) and rounded once. No model is instantiated and no delta
    weight formed; one tensor is in memory at a time, everything else is mapped.

    Args:
        base: a model folder, a single safetensors file or shards with an index.
        change: an Adapter, the folder of one, or a Change.
        out: the folder to write; completely, or not at all.
        force: replace `out` where it exists.
        tied: what happens where an adapter targets the input embedding or the output head of a
            model whose head shares the embedding's weight. "keep" changes the shared weight, as
            PEFT's merge_and_unload does; "untie" gives the head a weight of its own, so that the
            merged model computes what the adapter did.
        progress: called with bytes written, bytes in all, and the file's name.

    Raises:
        InvalidInput: an adapter or a checkpoint that is not valid, a module that the checkpoint
            does not have, shapes that disagree, a quantised weight, a merged weight that overflows,
            or `out` exists. All but the overflow is found before anything is written.
        FastAggError: there is no room on the disk.
    """
    started = time.perf_counter()
    folder, target = Path(base), Path(out)
    if tied not in get_args(Tied):
        raise InvalidInput(
            "not a way to treat tied weights",
            field="tied",
            expected="keep or untie",
            got=repr(tied),
        )
    reading = [folder]
    if isinstance(change, (str, os.PathLike)):
        reading.append(Path(change))
        change = Adapter.load(change)
    check_free(target, force=force, reading=reading)
    if isinstance(change, Adapter):
        change.check_finite()
        change = Change.of_adapter(change)
    checkpoint = Checkpoint.open(folder)
    targets = Targets(checkpoint, change, tied)
    nbytes = sum(
        entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in targets.entries.values()
    )
    check_room(target, nbytes)
    with new_folder(target, overwrite=force, client=change.name) as staged:
        _write_shards(targets, staged, nbytes, progress)
        added = {name: targets.entries[name].shard for name in targets.added}
        checkpoint.write_companions(staged, added, nbytes, targets.untied)
    return MergeReport(
        base=str(folder),
        out=str(target),
        adapter=change.name,
        merged=tuple(delta.module for delta in change.deltas),
        replaced=tuple(targets.replaced),
        added=tuple(targets.added),
        untied=targets.untied,
        shards=tuple(checkpoint.shards),
        left_out=tuple(map(str, checkpoint.companions()[1])),
        notes=tuple(targets.notes),
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
    )


def _write_shards(targets: Targets, folder: Path, nbytes: int, progress: Progress | None) -> None:
    done = 0
    for name, entries in targets.by_shard().items():
        header = json.loads(targets.base.shards[name].header)
        shapes = {entry.key: (entry.dtype, entry.shape) for entry in entries}
        with MappedWriter.create(folder / name, shapes, header.get("__metadata__")) as writer:
            for entry in entries:
                written = writer.tensor(entry.key)
                _fill(written, entry, targets)
                done += written.nbytes
                if progress is not None:
                    progress(done, nbytes, name)


def _fill(written: torch.Tensor, entry: Entry, targets: Targets) -> None:
    if entry.replacement is not None:
        written.copy_(entry.replacement)
    elif entry.span is not None:
        source = targets.base.shards[entry.source_shard].flat
        span = entry.span
        _bytes(written).copy_(source[span.offset : span.offset + span.nbytes])
    for delta in entry.deltas:
        delta.add_to(written)
    if entry.deltas or entry.replacement is not None:
        _check_overflow(written, entry, targets.change.name)


def _check_overflow(written: torch.Tensor, entry: Entry, client: str | None) -> None:
    from fastagg import ops

    if written.dtype in DTYPE_CODES:
        table = torch.tensor([[0, written.numel(), DTYPE_CODES[written.dtype]]], dtype=torch.int64)
        bad = int(ops.scan(_bytes(written), table)[0])
    else:
        bad = int((~written.isfinite()).sum())
    if bad:
        raise InvalidInput(
            f"{bad} values of the merged weight are NaN or infinite",
            client=client,
            module=entry.deltas[0].module if entry.deltas else None,
            field=entry.key,
            expected=f"finite values in {dtype_name(written.dtype)}",
            cure="Check the base checkpoint; where the sum overflows, convert it to bfloat16 or "
            "float32 first",
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
