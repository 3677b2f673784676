"""Whose outcome an event loop reads in which of its turns.

With many short calls in flight the outcomes of all workers lie there together, and to read all of
them, and to wake all who wait for them, keeps the loop from everything else for as long. So when it
has read from one worker, up to three others that it finds ready at once decline, and wait for its
next turns, in which the one that has waited longest is the first.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    import asyncio

    from .driver import ProcessWorker

__all__ = ["Turns"]

# Between two readers that are called in the same turn lies a microsecond, and between two turns a
# system call and mostly a task that is woken. To take one for the other costs a few microseconds.
APART_SECONDS = 5e-6
MOST_DECLINED = 3  # in a row: to be called and to decline costs something, too
# A selector calls those who declined again in the next turn; but uvloop tells only once of a
# connection that was reset. So now and then those who still wait are read from in any case.
REMIND_SECONDS = 0.05


class Turns:
    """Of one event loop; used on its thread. Its workers refer to it."""

    def __init__(self, home: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._read_at = 0.0  # when something was read last (monotonic)
        self._declined = 0  # how many had to wait since
        self._waiting: dict[ProcessWorker, None] = {}  # who had to wait, the longest first
        self._reminded = False  # whether they will be

    @staticmethod
    def of(home: asyncio.AbstractEventLoop) -> Turns:
        """The one of ``home``."""
        known = _all.get(home)
        turns = known() if known is not None else None
        if turns is None:
            turns = Turns(home)
            _all[home] = ref(turns)
        return turns

    def choose(self, worker: ProcessWorker) -> ProcessWorker | None:
        """There is something to read from ``worker``: from whom to read now, if from anyone."""
        if self._declined < MOST_DECLINED and monotonic() - self._read_at < APART_SECONDS:
            self._declined += 1
            self._waiting[worker] = None
            if not self._reminded:
                self._reminded = True
                self._home.call_later(REMIND_SECONDS, self._remind)
            return None
        self._declined = 0
        waiting = self._waiting
        if not waiting:
            return worker
        waiting[worker] = None  # keeps its place, if it has one
        while (first := next(iter(waiting))) is not worker and not first.runs_for(self._home):
            del waiting[first]  # its outcome has been read otherwise
        del waiting[first]
        return first

    def over(self) -> None:
        """It has been read."""
        self._read_at = monotonic()

    def _remind(self) -> None:
        self._reminded = False
        waiting, self._waiting = self._waiting, {}
        for worker in waiting:
            worker.read_from(self._home)


# Not the other way round as well: who waits refers to the loop.
_all: WeakKeyDictionary[asyncio.AbstractEventLoop, ref[Turns]] = WeakKeyDictionary()
