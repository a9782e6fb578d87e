"""One round on several processes: each has some of the modules, and none has the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from fastagg.distributed.group import Group

__all__ = ["group_of"]


def group_of(process_group: dist.ProcessGroup) -> Group:
    """The Group of a process group: made once, then the same.

    Raises:
        InvalidInput: it is none that this process is in.
    """
    # torch.distributed costs a second that only those who use it shall pay.
    from fastagg.distributed.group import Group

    return Group.of(process_group)
