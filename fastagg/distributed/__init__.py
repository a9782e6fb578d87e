"""One round on several processes: each has some of the modules, and none has the whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist

    from fastagg.distributed.group import Group

__all__ = ["agreeing", "gathered", "group_of"]

T = TypeVar("T")


def group_of(process_group: dist.ProcessGroup) -> Group:
    """The Group of a process group: made once, then the same.

    Raises:
        InvalidInput: it is none that this process is in.
    """
    # torch.distributed takes its time to be imported, and most never need it.
    from fastagg.distributed.group import Group

    return Group.of(process_group)


def agreeing(process_group: dist.ProcessGroup | None) -> AbstractContextManager[list[object]]:
    """A block that all processes pass, or in which all raise the same error; see ``Group.agreeing``."""
    return nullcontext([]) if process_group is None else group_of(process_group).agreeing()


def gathered(process_group: dist.ProcessGroup | None, value: T) -> list[T]:
    """What each process has; pickled, so for small things."""
    return [value] if process_group is None else group_of(process_group).gather(value)
