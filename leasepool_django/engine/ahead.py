"""Short calls that are sent to a busy worker before it has finished the one before.

The call waits in line all the same, and can be taken back until its worker begins it: for another
worker that has time, because its own is ended, because an older one has to stand in line again, or
because nobody waits for it any more. docs/architecture.md, "Sending ahead", tells why and when. All
of this is called under the dispatcher's lock; a backend takes part by ``Worker.may_put_ahead``,
``put_ahead`` and ``take_back``.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from .line import RUNNING, WAITING, Call, Counters, Line, Queue

if TYPE_CHECKING:
    from ..backends.base import Worker

__all__ = ["SendingAhead"]


class SendingAhead:
    """What was sent ahead for one line and the leases from it.

    ``seconds``: calls that take less, in the mean, are sent ahead, or a worker would wait for each;
    one that has been behind another for longer goes to the next worker that has time.
    ``recalling``: which call is on its way there or back, with whose worker, and the message while
    this process has it. If it is not ``None``, somebody was interrupted, and ``finish`` has to come
    before anything else that concerns calls sent ahead.
    """

    seconds = 0.001

    def __init__(self, line: Line, counters: Counters) -> None:
        self.line = line
        self._counters = counters
        self.recalling: tuple[Worker, Call, list[bytes]] | None = None

    def look(self, worker: Worker, home: asyncio.AbstractEventLoop) -> None:
        """Perhaps send ``worker``, which runs a call of ``home``'s, the next call of its line.

        Only where all workers have enough to do: what waits behind one cannot be had by another
        without being taken back.
        """
        slot = worker.slot
        running = slot.call
        if (
            running is None
            or running.home is not home
            or slot.worker is not worker
            or worker.ahead is not None
            or worker.leaving
            or self.recalling is not None
        ):
            return
        lease = slot.lease
        queue: Queue[Any]
        if lease is None:
            queue, workers = self.line, self.line.workers
        elif lease.open:
            queue, workers = lease, lease.workers
        else:
            return
        recalled = bool(queue.ahead) and self.recall_for(queue, has_other=True)
        if len(queue) >= workers and queue.waiting:
            call = next(iter(queue.waiting))
            if isinstance(call, Call) and call.home is home and worker.may_put_ahead(call):
                self._send(worker, call)
        if recalled:
            self.keep_order(queue)

    def _send(self, worker: Worker, call: Call) -> None:
        """Send ``call``, the first of its line, to ``worker``.

        All is noted before: whatever a signal handler raises here, what lies there must not stand
        in line as well.
        """
        self.recalling = worker, call, [call.payload]  # where it is until it is sent
        call.begun = 0.0
        call.ahead = worker
        worker.ahead = call
        queue = self.line.queue_of(call)
        queue.ahead[call] = None
        del queue.waiting[call]
        self.recalling = None
        if not worker.put_ahead(call):
            self.recalling = worker, call, [call.payload]
            self.finish()

    def recall(self, worker: Worker) -> bool:
        """Have what was sent ahead to ``worker`` stand in its place again.

        False if the worker has begun it; then it has finished the call before, whose outcome only
        has to be read.
        """
        if self.recalling is not None:
            self.finish()
        call = worker.ahead
        if call is None:
            return True
        if not self.may_be_recalled(call):
            return False
        self.recalling = worker, call, []
        return self.finish()

    def finish(self) -> bool:
        """Go on with what was begun, and interrupted; whether the call stands in line again.

        A signal handler that raises may do that at any point. Then others have the lock before this
        is called again; the order is such that nobody goes on with the call before it stands in
        line, and that all of it may be done again.
        """
        assert self.recalling is not None
        worker, call, taken = self.recalling
        queue = self.line.queue_of(call)
        if worker.ahead is call:
            worker.take_back(taken)
            if taken:
                worker.ahead = None
        if taken:
            if call.ahead is worker:
                queue.ahead.pop(call, None)
                call.ahead = None
            if call.state == WAITING:
                queue.rejoin(call)
        elif call in queue.ahead:
            del queue.ahead[call]
            self._counters.calls_started += 1
        self.recalling = None
        return bool(taken)

    def may_be_recalled(self, call: Call) -> bool:
        """Whether nobody has noticed that its worker has begun it."""
        return call in self.line.queue_of(call).ahead

    def recall_first(self, queue: Queue[Any]) -> bool:
        """Have the first of ``queue`` that was sent ahead stand there again."""
        while queue.ahead:
            worker = next(iter(queue.ahead)).ahead
            assert worker is not None
            if self.recall(worker):
                return True
        return False

    def recall_for(self, queue: Queue[Any], *, has_other: bool) -> bool:
        """A worker has time for the first of ``queue`` that was sent ahead; whether one comes back.

        ``has_other``: and for another that stands there. Then it is recalled only if the call
        before it takes so long that it would be overtaken by many.
        """
        worker = next(iter(queue.ahead)).ahead
        assert worker is not None
        before = worker.slot.call
        if not has_other:
            return self.recall_first(queue)
        if before is None or monotonic() - before.begun > self.seconds:
            return self.recall(worker)
        return False

    def keep_order(self, queue: Queue[Any]) -> None:
        """One that had left ``queue`` may stand there again, without a worker: it goes first.

        Those who came later and were sent ahead stand behind it again, where not begun yet.
        """
        first = next(iter(queue.waiting), None)
        if first is not None and queue.ahead:
            for call in [one for one in queue.ahead if one.since > first.since]:
                assert call.ahead is not None
                self.recall(call.ahead)

    def promote(self, worker: Worker) -> Call:
        """``worker`` has finished its call, and goes on with what was sent to it: that call."""
        call = worker.ahead
        assert call is not None
        if self.may_be_recalled(call):
            del self.line.queue_of(call).ahead[call]
            self._counters.calls_started += 1
        # It stays the one that was sent ahead until all else says that it runs: if a signal handler
        # raises before, its worker still is what has it.
        call.begun = monotonic()
        slot = worker.slot
        if slot.worker is worker:
            slot.call = call
        call.slot = slot
        call.worker = worker
        if call.state == WAITING:  # and has not been given up
            call.state = RUNNING
        worker.ahead = None
        return call
