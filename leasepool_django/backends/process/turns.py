"""Whose outcome an event loop reads in which of its turns.

With many short calls in flight the outcomes of all workers lie there together, and to read all of
them, and to wake all who wait for them, keeps the loop from everything else for as long. So of four
workers that it finds ready, it reads from one; the others wait for its next turns, which a selector
reminds it of, and the one that has waited longest is the first.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import asyncio

    from .driver import ProcessWorker

__all__ = ["Turns"]

# Between two outcomes that are read in different turns lie a system call and a task that is woken,
# which take longer; between two of the same turn, a microsecond.
APART_SECONDS = 5e-6
# To be asked and to decline takes a tenth of the time that an outcome does.
DECLINED = 3


class Turns:
    """Of one event loop; used on its thread."""

    def __init__(self) -> None:
        self.read_at = 0.0  # when an outcome was read last (monotonic)
        self.declined = 0  # how many had to wait since
        self.waiting: dict[ProcessWorker, None] = {}  # who had to wait, the longest first

    @staticmethod
    def of(home: asyncio.AbstractEventLoop) -> Turns:
        """The one of ``home``."""
        return _all.setdefault(home, Turns())

    def next(self, worker: ProcessWorker) -> ProcessWorker | None:
        """There is something to read from ``worker``: from whom to read now, if from anyone."""
        if self.declined < DECLINED and monotonic() - self.read_at < APART_SECONDS:
            self.declined += 1
            self.waiting[worker] = None
            return None
        self.declined = 0
        if not self.waiting:
            return worker
        self.waiting[worker] = None  # keeps its place, if it has one
        first = next(iter(self.waiting))
        del self.waiting[first]
        return first

    def over(self) -> None:
        """It has been read."""
        self.read_at = monotonic()

    def forget(self, worker: ProcessWorker) -> None:
        """There will be nothing to read from ``worker``."""
        self.waiting.pop(worker, None)


_all: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()
