"""Signs of life in the store of a process group, by which the living tell who is not."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import Store

__all__ = ["Heartbeat"]

_SECONDS = 0.25
# A rank that was not heard of for this long is gone: eight beats, in case its machine is busy.
_SILENCE = 2.0
_PATIENCE = timedelta(seconds=5)


class Heartbeat:
    """A thread that counts up in the store while the process lives.

    A collective that fails names no rank: the error that gloo has is that of a socket, and the ranks
    that notice first tear the others down. The store is asked instead, by whoever is left.

    Attributes:
        steps: collectives that this rank has begun; goes out with every beat.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.steps = 0
        self._rank, self._size = rank, size
        # Its own connection: a call of another thread may hold the first one for long.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(_PATIENCE)
        self._asking = threading.Lock()
        self._ended = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="fastagg-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Falls silent, which the others will take for the end of this rank."""
        self._ended.set()
        self._thread.join()

    def missing(self) -> tuple[list[int], list[int]]:
        """(ranks that are silent, ranks that live but began fewer collectives); waits two seconds.

        Raises:
            RuntimeError: the store does not answer.
        """
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._last(rank) for rank in others}
        silent, heard = set(others), dict(before)
        end = time.monotonic() + _SILENCE
        while silent and time.monotonic() < end:
            time.sleep(_SECONDS / 2)
            for rank in list(silent):
                heard[rank] = self._last(rank)
                if heard[rank] != before[rank]:
                    silent.discard(rank)
        late = [rank for rank in others if rank not in silent and heard[rank][1] < self.steps]
        return sorted(silent), late

    def _run(self) -> None:
        beats = 0
        while not self._ended.wait(_SECONDS):
            beats += 1
            try:
                self._beat(beats)
            except RuntimeError:  # the store is gone, and with it whoever would ask
                return

    def _beat(self, number: int) -> None:
        with self._asking:
            self._store.set(f"fastagg/beat/{self._rank}", f"{number} {self.steps}")

    def _last(self, rank: int) -> tuple[int, int]:
        with self._asking:
            key = f"fastagg/beat/{rank}"
            if not self._store.check([key]):
                return -1, -1
            number, steps = self._store.get(key).decode().split()
            return int(number), int(steps)
