"""A command that torchrun starts once a rank: one process group, which speaks with one voice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer

from fastagg.cli.failures import BAD_INPUT, INTERRUPTED, TRACEBACK_VARIABLE, fail

if TYPE_CHECKING:
    import torch.distributed as dist

# What torchrun tells every process that it starts.
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_alone() -> bool:
    """Whether this process is not one of several that torchrun started."""
    return os.environ.get("WORLD_SIZE") == "1" or not all(os.environ.get(name) for name in _NAMES)


def is_first() -> bool:
    """Whether this process is alone, or the rank that prints."""
    return is_alone() or os.environ["RANK"] == "0"


@contextmanager
def leaving() -> Iterator[None]:
    """Ends one of several processes as the block does, at once.

    gloo's threads let go of the tensors of a collective some time after it. One that does so while
    the interpreter ends aborts the process, whose exit code would no longer be its own.
    """
    try:
        yield
    except SystemExit as left:
        if is_alone() or not isinstance(left.code, int):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code)


@contextmanager
def process_group(device: str, timeout: float, *, as_json: bool) -> Iterator[dist.ProcessGroup | None]:
    """The group of the processes that torchrun started; None where there is but this one.

    An error that all agree on is said by the first alone, and what one finds out by itself (that
    another is gone, above all) by whoever does. All leave with `BAD_INPUT` then.

    Args:
        device: "auto", "cpu" or "cuda": gloo joins CPUs; between GPUs, one a process, NCCL does.
        timeout: seconds that one waits for another.
    """
    if is_alone():
        yield None
        return
    from fastagg.distributed import group_of
    from fastagg.errors import RankLost

    try:
        pg = _joined(device, timeout)
    except Exception as error:
        fail(error, as_json=as_json)
    import torch.distributed as dist

    group = group_of(pg)
    together = True
    try:
        yield pg
    except KeyboardInterrupt:
        together = False
        if group.rank == 0:
            raise
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        together = not isinstance(error, (RankLost, typer.Exit))
        if os.environ.get(TRACEBACK_VARIABLE) or isinstance(error, typer.Exit):
            raise
        if group.rank == 0 or not _agreed(error, group.agreed_on):
            together = together and _agreed(error, group.agreed_on)
            fail(error, as_json=as_json)
        raise typer.Exit(BAD_INPUT) from None
    except BaseException:  # a signal: the others will notice
        together = False
        raise
    finally:
        # torchrun ends all as soon as one leaves with an error, even before the first has spoken.
        if together:
            group.gather(None)
        group.close()
        dist.destroy_process_group()


def _joined(device: str, timeout: float) -> dist.ProcessGroup:
    import torch
    import torch.distributed as dist

    from fastagg.errors import FastAggError
    from fastagg.rounds.options import parse_device

    backend = "gloo"
    if device != "cpu":
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if parse_device(device).type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise FastAggError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find the others within "
            f"{timeout:g} seconds: {error}. Start all of them with torchrun, or unset RANK and "
            "WORLD_SIZE to work in one process"
        ) from error
    pg: Any = dist.group.WORLD
    return pg  # type: ignore[no-any-return]


def _agreed(error: BaseException | None, agreed_on: BaseException | None) -> bool:
    """Whether an error is the one agreed on, or was made of it."""
    while error is not None:
        if error is agreed_on:
            return True
        error = error.__cause__
    return False
