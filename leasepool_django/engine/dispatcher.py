"""Who gets which worker: the line, the leases and the counts, under the manager's one lock.

Everything here is quick and never blocks, runs no user code, and wakes callers only after the lock
is free. What takes time (starting and ending workers, watching deadlines) the housekeeper does.

The lock guards: the line and its pools, every slot, every ``LeaseState``, every waiter's state,
``Worker.leaving`` and ``Worker.ahead``, and the counters. A caller on an event loop is always woken
on that loop's own thread; one that does not pick up what it was granted within ``PICKUP_SECONDS``
loses it.

Long because taking it further apart would spread one lock over more modules.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..exceptions import (
    LeasePoolNotStartedError,
    LeaseUnavailableError,
    WorkerCrashedError,
)
from .ahead import SendingAhead
from .events import Event
from .lease import LeaseState, current_holder
from .line import (
    DONE,
    GONE,
    GRANTED,
    NEW,
    RUNNING,
    WAITING,
    Call,
    Counters,
    Line,
    Pool,
    Queue,
    Request,
    Slot,
    Waiter,
)

if TYPE_CHECKING:
    from ..backends.base import Worker

__all__ = ["Dispatcher"]

PICKUP_SECONDS = 5.0
MAX_DELIVERIES = 3  # workers that may have died of receiving a call before it fails


@dataclass
class Due:
    """What ``look`` found: when to look again, expiring and expired leases, overdue calls.

    ``dropped``: leases that nobody has any more, and that have not been given back; ``lost``: calls
    whose loop was closed, or whose caller was interrupted between two steps.
    """

    next_look: float = math.inf
    soft: list[LeaseState] = field(default_factory=list)
    hard: list[LeaseState] = field(default_factory=list)
    dropped: list[LeaseState] = field(default_factory=list)
    overdue: list[tuple[Worker, Call]] = field(default_factory=list)
    lost: list[tuple[Worker, Call]] = field(default_factory=list)

    def by(self, moment: float) -> None:
        """Look again at ``moment`` (monotonic) at the latest."""
        self.next_look = min(self.next_look, moment)


class Dispatcher:
    """The account of one manager.

    ``tell`` emits events; ``grow`` asks for another pool; ``retire`` ends the worker of a slot in a
    closing pool; ``idle_while_closed`` is told of each call and lease that ends after ``close``.
    ``time_out``, set by those who wait, takes a waiter whose seconds are over out of the line.
    """

    time_out: Callable[[Waiter, float], object]

    def __init__(
        self,
        name: str,
        *,
        max_waiting: int | None,
        tell: Callable[[Event], None],
        grow: Callable[[], None],
        retire: Callable[[Slot], None],
        idle_while_closed: Callable[[], None],
    ) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.line = Line()
        self.leases: set[LeaseState] = set()
        self.counters = Counters()
        self.ahead = SendingAhead(self.line, self.counters)
        self.closed: str | None = "has not been started"  # why no lease can be had, or None
        self.max_pools = 0
        self._max_waiting = max_waiting
        self._tell = tell
        self._grow = grow
        self._retire = retire
        self._idle_while_closed = idle_while_closed
        self._granted: dict[Waiter, float] = {}  # to be picked up on their own threads: since when
        # Who no longer waits, and is still to be told why.
        self._refused: dict[Waiter, Callable[[], BaseException]] = {}
        self._lease_number = 0

    # -- asking ------------------------------------------------------------------------------------

    def begin(self, call: Call) -> Worker | None:
        """Give a one-shot call a worker now, or a place at the end of the line."""
        with self.lock:
            line = self.line
            if self.closed is None and not line.waiting:
                slot = line.take_one()
                if slot is not None:
                    call.slot = slot
                    call.worker = worker = slot.worker
                    slot.call = call
                    call.state = RUNNING
                    self.counters.calls_started += 1
                    return worker
            if self.leases:
                self._refuse_waiting_for_oneself(call)
            self._stand_in_line(call)
            return None

    def begin_in(self, lease: LeaseState, call: Call) -> Worker | None:
        """Give a call one of the lease's workers, or a place in the lease's own line."""
        with self.lock:
            if not lease.open:
                raise lease.refusal()
            call.lease = lease
            if lease.free and not lease.waiting:
                slot = lease.free.pop()
                call.slot = slot
                call.worker = worker = slot.worker
                slot.call = call
                call.state = RUNNING
                self.counters.calls_started += 1
                return worker
            call.since = monotonic()
            lease.join(call)
            return None

    def request(self, request: Request, *, wait: bool) -> bool:
        """Grant a lease now, or (with ``wait``) a place at the end of the line; whether granted."""
        with self.lock:
            line = self.line
            if self.closed is None and not line.waiting:
                slots = line.take(request.workers)
                if slots is not None:
                    self._lease(request, slots)
                    request.state = RUNNING
                    return True
            if self.leases and wait:
                self._refuse_waiting_for_oneself(request)
            self._stand_in_line(request, wait=wait)
            return False

    def _stand_in_line(self, waiter: Waiter, *, wait: bool = True) -> None:
        if self.closed is not None:
            raise LeasePoolNotStartedError(f"The manager {self.name!r} {self.closed}.")
        waiting = len(self.line)
        if not wait or (self._max_waiting is not None and waiting >= self._max_waiting):
            self.counters.rejected += 1
            if not wait:
                why = (
                    "others wait already"
                    if waiting
                    else f"no pool has {waiter.workers} free worker(s)"
                ) + ", and wait=False was asked for"
            else:
                why = f"the line is full ({waiting} waiting, max_waiting={self._max_waiting})"
            # An idle manager that is too small grows for the next caller even if this one leaves.
            self._want_pool()
            raise LeaseUnavailableError(
                f"No lease of {waiter.workers} worker(s) of {self.name!r} can be had now: {why}. "
                "Try again later.",
                waiting=waiting,
                retry_after=self._estimate(),
            )
        waiter.since = monotonic()
        if isinstance(waiter, Request):
            self.line.count(waiter, 1)
        self.line.join(waiter)
        if waiting == 0:
            self._want_pool()

    def _want_pool(self) -> None:
        if self._may_grow():
            self._grow()

    def _may_grow(self) -> bool:
        # One pool at a time: while one warms up nobody knows yet whether it is enough.
        pools = self.line.pools
        return len(pools) < self.max_pools and all(pool.warm for pool in pools)

    def _refuse_waiting_for_oneself(self, request: Waiter) -> None:
        holder = current_holder()
        held = [lease for lease in self.leases if lease.holder() is holder and not lease.dropped]
        # One that closes makes room for another.
        pools = [pool for pool in self.line.pools if not pool.closing]
        if not held or len(pools) < self.max_pools:
            return
        mine = {slot for lease in held for slot in lease.slots}
        for pool in pools:
            if sum(slot not in mine for slot in pool.slots) >= request.workers:
                return
        lease = held[0]
        raise LeaseUnavailableError(
            f"This task already holds lease {lease.lease_id} (owner {lease.owner!r}) of "
            f"{self.name!r} and asks for another {request.workers} worker(s) that cannot come free "
            "until it gives the first one back: it would wait for itself. Run the calls on the "
            "lease it holds, or release that one first.",
            waiting=len(self.line),
            waits_for_itself=True,
        )

    # -- granting ----------------------------------------------------------------------------------

    def _lease(self, request: Request, slots: list[Slot]) -> None:
        self._lease_number += 1
        request.lease = lease = LeaseState(
            f"{self.name}-{self._lease_number}",
            request.owner,
            slots,
            request.lease_seconds,
            request.grace_seconds,
        )
        for slot in slots:
            slot.lease = lease
        self.leases.add(lease)
        self.counters.leases_granted += 1

    def _assign(
        self, call: Call, slot: Slot, home: asyncio.AbstractEventLoop | None, wakes: list[Waiter]
    ) -> bool:
        """Hand ``slot`` to a waiting call; whether the caller may begin it here and now."""
        call.worker = slot.worker
        call.slot = slot
        slot.call = call
        here = home is not None and call.home is home
        if here:
            call.state = RUNNING
        else:
            self._grant(call, wakes)
        self.counters.calls_started += 1
        return here

    def _grant(self, waiter: Waiter, wakes: list[Waiter]) -> None:
        if isinstance(waiter, Call):
            waiter.begun = 0.0
        self._granted[waiter] = monotonic()  # so that ``look`` finds it, whatever is raised
        waiter.state = GRANTED
        wakes.append(waiter)

    def _serve(self, wakes: list[Waiter]) -> None:
        """Give the heads of the line what fits, to be picked up on their own threads."""
        if self.line.moved is not None:
            self._settle(self.line, wakes)
        if self.line.ahead:
            for _ in range(sum(len(pool.idle) for pool in self.line.pools)):
                self.ahead.recall_first(self.line)
        for waiter, slots in self.line.grants():
            if isinstance(waiter, Call):
                self._assign(waiter, slots[0], None, wakes)
            else:
                assert isinstance(waiter, Request)
                self._lease(waiter, slots)
                self._grant(waiter, wakes)
        if len(self.line):
            self._want_pool()

    def _wake(self, wakes: list[Waiter]) -> None:
        """Without the lock: tell each granted waiter; take back what a closed loop was given."""
        while wakes:
            waiter = wakes.pop(0)
            home = waiter.home
            if home is None:
                waiter.wake()
                continue
            try:
                home.call_soon_threadsafe(self._pick_up, waiter)
            except RuntimeError:  # the loop is closed: its caller is gone for good
                with self.lock:
                    self._take_back(waiter, None, wakes)

    def _pick_up(self, waiter: Waiter) -> None:
        """On the waiter's own loop: take what was granted, unless it left meanwhile.

        It counts as granted until that is done, so that ``look`` finds it if it never is.
        """
        with self.lock:
            if waiter.state != GRANTED:
                if waiter.state == GONE and waiter.error is not None:
                    waiter.wake()
                return
            waiter.state = RUNNING
            self._granted[waiter] = monotonic()
        if not isinstance(waiter, Call):
            waiter.wake()
        else:
            assert waiter.worker is not None
            assert waiter.home is not None
            try:
                waiter.worker.begin(waiter, waiter.home, eager=False)
            except BaseException as error:
                waiter.error = error if isinstance(error, Exception) else _interrupted(waiter)
                worker = self.abandon(waiter)
                if worker is not None:
                    worker.kill(partial(_self, waiter.error))
                waiter.wake()
                if not isinstance(error, Exception):
                    raise
        with self.lock:
            if waiter.state != GRANTED:  # again: its worker was dead, and it has another one
                self._granted.pop(waiter, None)

    def take_up(self, waiter: Waiter) -> bool:
        """For a blocking caller that was woken: whether what it was granted is its own."""
        with self.lock:
            self._granted.pop(waiter, None)
            if waiter.state != GRANTED:
                return False
            waiter.state = RUNNING
            return True

    def _settle(self, queue: Queue[Any], wakes: list[Waiter]) -> None:
        """Under the lock: who was taken out of ``queue``, and given nothing, stands there again.

        A signal handler that raises, as for a time limit, may come between two steps.
        """
        waiter = queue.moved
        if waiter is None or waiter.state != WAITING or waiter.ahead is not None:
            queue.moved = None
            return
        lease = None
        if isinstance(waiter, Request):
            lease, waiter.lease = waiter.lease, None
        elif (slot := waiter.slot) is not None and slot.call is waiter:
            if slot.worker is None or slot.worker.leaving:
                queue.moved = None  # whoever was interrupted tells it
                return
            slot.call = None  # ``look`` frees it, unless its worker is about to be ended
            waiter.slot = waiter.worker = None
        self._granted.pop(waiter, None)
        queue.rejoin(waiter)
        queue.moved = None
        if queue is self.line:
            self.line.recount()
        if lease is not None:
            self._close_lease(lease, wakes)

    def _take_back(self, waiter: Waiter, error: BaseException | None, wakes: list[Waiter]) -> None:
        """Under the lock: pass on a grant that was not picked up."""
        self._granted.pop(waiter, None)
        if waiter.state == GRANTED:
            waiter.state = GONE
            waiter.error = error
            self._give_back(waiter, wakes)

    def _give_back(self, waiter: Waiter, wakes: list[Waiter]) -> None:
        """Under the lock: what ``waiter`` was granted but never used goes to the next."""
        if isinstance(waiter, Call):
            slot = waiter.slot
            if slot is not None:  # or it was interrupted here
                if slot.call is waiter:  # or its worker has died, and the slot is in other hands
                    slot.call = None
                    self._free(slot, wakes)
                waiter.slot = None
                self.counters.calls_started -= 1
        else:
            assert isinstance(waiter, Request)
            assert waiter.lease is not None
            self._close_lease(waiter.lease, wakes)

    # -- freeing -----------------------------------------------------------------------------------

    def call_ended(
        self,
        worker: Worker,
        call: Call,
        home: asyncio.AbstractEventLoop | None,
        *,
        retiring: bool,
        takes_ahead: bool = False,
    ) -> Call | None:
        """See ``Host.call_ended``."""
        with self.lock:
            slot = worker.slot
            worker.calls += 1
            if call.state == RUNNING:
                call.state = DONE
                counters = self.counters
                counters.calls_finished = count = counters.calls_finished + 1
                mean = counters.mean_call_seconds
                if count < 20:
                    counters.mean_call_seconds = _moved(mean, monotonic() - call.begun, count)
                else:  # the same, at each call
                    counters.mean_call_seconds = mean + (monotonic() - call.begun - mean) * 0.05
            if retiring:
                worker.leaving = True
            if self.ahead.recalling is not None:
                self.ahead.finish()
            wakes: list[Waiter] = []
            lease = slot.lease
            queue: Queue[Any] = self.line if lease is None else lease
            if queue.moved is not None:
                self._settle(queue, wakes)
            recalled = False  # whether one stands in line again that came before others
            if worker.ahead is not None:
                if (takes_ahead and not worker.leaving) or not self.ahead.recall(worker):
                    return self.ahead.promote(worker)
                recalled = True
            if slot.worker is not worker:
                return None  # it is dead, and its slot is in other hands
            slot.call = None
            if self.closed is not None:
                self._idle_while_closed()
            if worker.leaving:
                self.ahead.keep_order(queue)
                return None
            following: Call | None = None
            if lease is not None and lease.open:
                if lease.ahead:
                    recalled |= self.ahead.recall_for(lease, has_other=bool(lease.waiting))
                if not lease.waiting:
                    lease.free.append(slot)
                    return None
                following = lease.pop()
            elif lease is None and not slot.pool.closing:
                waiting = self.line.waiting
                head = next(iter(waiting), None)
                if self.line.ahead:
                    recalled |= self.ahead.recall_for(self.line, has_other=isinstance(head, Call))
                    head = next(iter(waiting), None)
                if head is None:
                    slot.pool.idle.append(slot)
                    return None
                if isinstance(head, Call):
                    self.line.pop()
                    following = head
            here = False
            if following is None:
                self._free(slot, wakes)
            else:
                here = self._assign(following, slot, home, wakes)
                queue.moved = None
            if recalled:
                self.ahead.keep_order(queue)
            if here:
                return following
        if wakes:
            self._wake(wakes)
        return None

    def call_undelivered(self, worker: Worker, call: Call, *, suspect: bool = True) -> bool:
        """Put a call that a dead worker never received back in its place; false if too often."""
        with self.lock:
            if self.ahead.recalling is not None:
                self.ahead.finish()
            worker.leaving = True
            if worker.slot.call is call:
                worker.slot.call = None
            if call.state != RUNNING:
                return True
            self.counters.calls_started -= 1
            call.deliveries += suspect
            if call.deliveries >= MAX_DELIVERIES:
                call.state = DONE
                return False
            call.slot = call.ahead = None
            now = monotonic()
            if not call.since:
                # It was served at once, so all who wait have come later, also those who did while
                # its thread was about to note when it began.
                head = self.line.queue_of(call).head
                before = now if head is None else math.nextafter(head.since, 0.0)
                call.since = min(call.begun or now, before)
            if call.begun:
                call.spent += now - call.begun
                call.begun = 0.0
            wakes: list[Waiter] = []
            if call.lease is not None:
                if call.lease.open:
                    call.lease.rejoin(call)
                    self._serve_lease(call.lease, wakes)
                else:
                    call.state = DONE
                    call.error = call.lease.refusal()
                    wakes.append(call)
            elif self.closed is not None:
                call.state = DONE
                call.error = LeasePoolNotStartedError(f"The manager {self.name!r} {self.closed}.")
                wakes.append(call)
            else:
                self.line.rejoin(call)
                self._serve(wakes)
            self.ahead.keep_order(self.line.queue_of(call))
        self._tell_waiters(wakes)
        self._limit_wait(call)
        return True

    def _limit_wait(self, call: Call) -> None:
        """Without the lock: the caller's timer was not set, or is over while it had a worker."""
        home, seconds = call.home, call.patience
        if home is not None and seconds is not None:
            left = max(0.0, call.since + call.spent + seconds - monotonic())
            try:
                home.call_soon_threadsafe(home.call_later, left, self.time_out, call, seconds)
            except RuntimeError:
                return  # the loop is closed: its caller is gone for good

    def _serve_lease(self, lease: LeaseState, wakes: list[Waiter]) -> None:
        if lease.moved is not None:
            self._settle(lease, wakes)
        while lease.free and (lease.waiting or self.ahead.recall_first(lease)):
            self._assign(lease.pop(), lease.free.pop(), None, wakes)
            lease.moved = None

    def _free(self, slot: Slot, wakes: list[Waiter]) -> None:
        """Under the lock: a slot with a ready worker and no call goes where it belongs."""
        lease = slot.lease
        if lease is not None and lease.open:
            lease.free.append(slot)
            self._serve_lease(lease, wakes)
            return
        if lease is not None:
            self._leave_lease(slot, lease)
        self._put_back(slot)
        self._serve(wakes)

    def _put_back(self, slot: Slot) -> None:
        """Under the lock: nobody has the slot any more."""
        if slot.pool.closing:
            self._retire(slot)
        else:
            slot.pool.idle.append(slot)

    def _leave_lease(self, slot: Slot, lease: LeaseState) -> None:
        lease.slots.discard(slot)
        slot.lease = None

    def slot_ready(self, slot: Slot, worker: Worker) -> None:
        """The slot has a worker that can take calls."""
        wakes: list[Waiter] = []
        with self.lock:
            slot.worker = worker
            slot.ready_at = monotonic()
            slot.pool.warm = True
            self._free(slot, wakes)
        self._wake(wakes)

    def slot_gone(self, slot: Slot) -> bool:
        """The slot's worker has ended; whether it is to be replaced."""
        with self.lock:
            slot.worker = None
            slot.call = None
            lease = slot.lease
            if lease is not None:
                if slot in lease.free:
                    lease.free.remove(slot)
                if not lease.open:
                    self._leave_lease(slot, lease)
            pool = slot.pool
            if slot in pool.idle:
                pool.idle.remove(slot)
            if pool.closing:
                pool.slots.remove(slot)
                if not pool.slots and pool in self.line.pools:
                    self.line.pools.remove(pool)
                    if len(self.line):
                        self._want_pool()
                return False
            return True

    # -- sending ahead -----------------------------------------------------------------------------

    def look_ahead(self, worker: Worker, home: asyncio.AbstractEventLoop) -> None:
        """See ``Host.look_ahead``."""
        if self.counters.mean_call_seconds <= self.ahead.seconds:
            with self.lock:
                self.ahead.look(worker, home)

    def worker_dead(self, worker: Worker) -> None:
        """See ``Host.worker_dead``."""
        wakes: list[Waiter] = []
        with self.lock:
            call = worker.ahead
            if call is None:
                return
            self.ahead.recall(worker)
            self._serve(wakes)
            self.ahead.keep_order(self.line.queue_of(call))
        self._wake(wakes)

    # -- leaving -----------------------------------------------------------------------------------

    def abandon(self, waiter: Waiter) -> Worker | None:
        """The caller is gone: leave the line or give back; returns a worker that must be killed."""
        wakes: list[Waiter] = []
        worker = None
        with self.lock:
            if self.ahead.recalling is not None:
                self.ahead.finish()
            if (
                waiter.state == WAITING
                and waiter.ahead is not None
                and not self.ahead.recall(waiter.ahead)
            ):
                worker = waiter.ahead  # has begun it
                worker.leaving = True
            state = waiter.state
            if worker is not None:
                self.counters.calls_abandoned += 1
            elif state == NEW:
                self._undo(waiter, wakes)
            elif state == WAITING:
                self._leave_line(waiter, wakes)
                self.counters.calls_abandoned += isinstance(waiter, Call)
            elif state == GRANTED:
                self._granted.pop(waiter, None)
                self._give_back(waiter, wakes)
            elif state == RUNNING:
                if isinstance(waiter, Call):
                    self.counters.calls_abandoned += 1
                    worker = waiter.worker
                    assert worker is not None
                    if not self.ahead.recall(worker):
                        worker = None  # it has finished, and is at another call
                    else:
                        self.ahead.keep_order(self.line.queue_of(waiter))
                        if waiter.home is not None and worker.has_answered():
                            worker = None  # it has finished, and is free when that is read
                        else:
                            worker.leaving = True
                else:
                    assert isinstance(waiter, Request)
                    assert waiter.lease is not None
                    self._close_lease(waiter.lease, wakes)
            elif state == GONE and isinstance(waiter, Call) and waiter.worker is not None:
                # Perhaps it was interrupted before its worker was killed.
                slot = waiter.worker.slot
                if slot.call is waiter and slot.worker is waiter.worker and slot.worker.leaving:
                    worker = waiter.worker
            if state != DONE:
                waiter.state = GONE  # at last, so that all of it may be done again
        self._wake(wakes)
        return worker

    def _undo(self, waiter: Waiter, wakes: list[Waiter]) -> None:
        """Under the lock: a signal handler may have raised while ``waiter`` got what it asked for.

        Or while it got a place in line; mostly it was just refused.
        """
        if waiter.since:
            if isinstance(waiter, Call) and waiter.lease is not None:
                waiter.lease.leave(waiter)
            else:
                self.line.leave(waiter)
                self.line.recount()
        if isinstance(waiter, Call):
            slot = waiter.slot
            if slot is not None and slot.call is waiter:
                slot.call = None
                self._free(slot, wakes)
        elif isinstance(waiter, Request) and waiter.lease is not None:
            self._close_lease(waiter.lease, wakes)

    def leave(self, waiter: Waiter, error: Callable[[], BaseException]) -> bool:
        """Take a waiter whose time is up out of the line; false if it was granted meanwhile."""
        wakes: list[Waiter] = []
        with self.lock:
            if self.ahead.recalling is not None:
                self.ahead.finish()
            if waiter.state != WAITING:
                return False
            if waiter.ahead is not None and not self.ahead.recall(waiter.ahead):
                return False
            self._refused[waiter] = error
            self._leave_line(waiter, wakes)
            waiter.state = GONE
        waiter.error = error()
        self._wake(wakes)
        waiter.wake()
        self._refused.pop(waiter, None)
        return True

    def _leave_line(self, waiter: Waiter, wakes: list[Waiter]) -> None:
        if isinstance(waiter, Call) and waiter.lease is not None:
            waiter.lease.leave(waiter)
        else:
            self.line.leave(waiter)
            if isinstance(waiter, Request):
                self.line.count(waiter, -1)
            self._serve(wakes)  # those behind it may fit where it did not

    # -- leases ------------------------------------------------------------------------------------

    def release(self, lease: LeaseState) -> bool:
        """Give a lease back. Running calls finish first, waiting ones are refused. Idempotent."""
        wakes: list[Waiter] = []
        with self.lock:
            if not lease.open:
                return False
            self._close_lease(lease, wakes)
        self._tell_refused()
        self._wake(wakes)
        return True

    def revoke(self, lease: LeaseState) -> list[Worker] | None:
        """Take an expired lease away; returns the workers whose calls must be stopped.

        ``None`` if it has been released or extended meanwhile.
        """
        wakes: list[Waiter] = []
        with self.lock:
            if not lease.open or lease.hard_expires_at > monotonic():
                return None
            lease.expired = True
            self.counters.leases_expired += 1
            calls = [slot.call for slot in lease.slots if slot.call is not None]
            self._close_lease(lease, wakes)
            workers = []
            granted = []
            for call in calls:
                if call.state == GRANTED:  # never begun: no reason to kill its worker
                    self._granted.pop(call, None)
                    call.state = GONE
                    call.error = lease.refusal()
                    self._give_back(call, wakes)
                    granted.append(call)
                else:
                    assert call.worker is not None
                    call.worker.leaving = True
                    workers.append(call.worker)
        self._tell_refused()
        self._tell_waiters(granted)
        self._wake(wakes)
        return workers

    def _close_lease(
        self,
        lease: LeaseState,
        wakes: list[Waiter],
        refusal: Callable[[], BaseException] | None = None,
    ) -> None:
        """Under the lock: idle slots go back now, busy ones as their calls end.

        Those who wait in it are to be told by ``_tell_refused``. May be done again, after it was
        interrupted.
        """
        while lease.ahead:
            self.ahead.recall_first(lease)
        if lease.moved is not None:
            self._settle(lease, wakes)
        if lease.open:
            self.leases.add(lease)  # it may have been interrupted as it was given
            lease.open = False
            counters = self.counters
            counters.leases_ended += 1
            counters.mean_lease_seconds = _moved(
                counters.mean_lease_seconds, monotonic() - lease.begun, counters.leases_ended
            )
            if self.closed is not None:
                self._idle_while_closed()
        self._refuse(lease, refusal or lease.refusal)
        while lease.free:
            slot = lease.free.pop()
            if slot.lease is lease:
                self._leave_lease(slot, lease)
                self._put_back(slot)
        for slot in [slot for slot in lease.slots if slot.worker is None]:
            self._leave_lease(slot, lease)
        self.leases.discard(lease)
        self._serve(wakes)

    def extend(self, lease: LeaseState, seconds: float) -> None:
        """Set the soft expiry to ``seconds`` from now."""
        with self.lock:
            if not lease.open:
                raise lease.refusal()
            lease.soft_expires_at = monotonic() + seconds
            lease.hard_expires_at = lease.soft_expires_at + lease.grace_seconds
            lease.soft_expiry_told = False

    # -- pools -------------------------------------------------------------------------------------

    def add_pool(self, pool: Pool) -> None:
        """Count ``pool``; its workers join by ``slot_ready``."""
        with self.lock:
            self.line.pools.append(pool)

    def may_grow(self) -> bool:
        """Whether another pool may be added for those who wait."""
        with self.lock:
            return self._may_grow()

    def lacks_pool(self, target: int) -> bool:
        """Whether there are fewer than ``target`` pools that stay, and room for another."""
        with self.lock:
            pools = self.line.pools
            return len(pools) < self.max_pools and sum(not p.closing for p in pools) < target

    def close_pools_above(self, target: int) -> None:
        """Close idle pools until ``target`` are left, unless somebody waits."""
        with self.lock:
            pools = self.line.pools
            surplus = sum(not pool.closing for pool in pools) - target
            for pool in reversed(pools):
                if surplus <= 0 or self.line.waiting:
                    return
                if not pool.closing and len(pool.idle) == len(pool.slots):
                    surplus -= 1
                    pool.closing = True
                    idle, pool.idle = pool.idle, []
                    for slot in idle:
                        self._retire(slot)

    # -- ending ------------------------------------------------------------------------------------

    def close(self, why: str, closing: Callable[[], None]) -> None:
        """Refuse all who wait and all who come from now on; calls that run go on.

        ``closing`` is called under the lock, before anybody is told.
        """
        with self.lock:
            while self.line.ahead:
                self.ahead.recall_first(self.line)  # to be refused with those who wait there
            self._settle(self.line, [])
            self.closed = why
            closing()
            self._refuse(
                self.line, lambda: LeasePoolNotStartedError(f"The manager {self.name!r} {why}.")
            )
            self.line.recount()
        self._tell_refused()

    def discard(self) -> None:
        """After a fork, in the child: the workers are the parent's, and so are all leases."""
        self.lock = threading.Lock()  # a thread that is not in this process may have held the other
        self.closed = "belongs to the parent of this process"
        for lease in self.leases:
            lease.inherited = True
            lease.open = False

    def working(self, *, leases: bool) -> bool:
        """Whether a call runs or waits in its lease, or with ``leases``: whether one is held."""
        with self.lock:
            if leases and self.leases:
                return True
            return any(lease.waiting for lease in self.leases) or any(
                slot.call is not None for pool in self.line.pools for slot in pool.slots
            )

    def end(self) -> list[Worker]:
        """Close all leases and pools; returns the workers that still run calls, to be killed."""
        wakes: list[Waiter] = []
        granted: list[Call] = []

        def error() -> LeasePoolNotStartedError:
            return LeasePoolNotStartedError(f"The manager {self.name!r} is stopping.")

        with self.lock:
            for pool in self.line.pools:
                pool.closing = True
            for lease in list(self.leases):
                lease.ended = True
                self._close_lease(lease, wakes, error)
            busy = []
            for pool in self.line.pools:
                idle, pool.idle = pool.idle, []
                for slot in idle:
                    self._retire(slot)
                for slot in pool.slots:
                    call = slot.call
                    if call is None or slot.worker is None:
                        continue
                    if call.state == GRANTED:
                        self._granted.pop(call, None)
                        call.state = GONE
                        call.error = error()
                        slot.call = call.slot = None
                        self.counters.calls_started -= 1
                        self._retire(slot)
                        granted.append(call)
                    else:
                        slot.worker.leaving = True
                        busy.append(slot.worker)
        assert not wakes  # close() has emptied the line
        self._tell_refused()
        self._tell_waiters(granted)
        return busy

    def _refuse(self, queue: Queue[Any], error: Callable[[], BaseException]) -> None:
        """Under the lock: nobody waits there any more; ``_tell_refused`` tells them."""
        while queue.waiting:
            waiter = next(iter(queue.waiting))
            self._refused[waiter] = error
            del queue.waiting[waiter]
            waiter.state = GONE

    def _tell_refused(self) -> None:
        """Without the lock. Whoever is told twice, by two threads, takes no notice."""
        if not self._refused:
            return
        with self.lock:
            for waiter in list(self._refused):
                if waiter.state == WAITING:  # to refuse it was interrupted
                    (self.line.queue_of(waiter) if isinstance(waiter, Call) else self.line).leave(
                        waiter
                    )
                    self.line.recount()
                    waiter.state = GONE
                elif waiter.state != GONE:
                    self._refused.pop(waiter, None)  # it got what it wants after all
            refused = list(self._refused.items())
        for waiter, error in refused:
            waiter.error = error()
            waiter.wake_from_anywhere()
            self._refused.pop(waiter, None)

    def _tell_waiters(self, waiters: list[Any]) -> None:
        """Without the lock: wake those with an error, and those granted in the usual way."""
        granted = [waiter for waiter in waiters if waiter.state == GRANTED]
        for waiter in waiters:
            if waiter.state != GRANTED:
                waiter.wake_from_anywhere()
        self._wake(granted)

    # -- what the housekeeper looks after ----------------------------------------------------------

    def look(self, now: float) -> Due:
        """Find what is due at ``now`` (monotonic), and condemn the workers of overdue calls."""
        due = Due()
        wakes: list[Waiter] = []
        with self.lock:
            if self.ahead.recalling is not None:
                self.ahead.finish()
            if self.line.moved is not None:
                self._settle(self.line, wakes)
            for lease in list(self.leases):
                self._look_at_lease(lease, now, due, wakes)
            for pool in self.line.pools:
                for slot in pool.slots:
                    self._look_at_slot(slot, now, due, wakes)
            told: list[Waiter] = []
            for waiter, since in list(self._granted.items()):
                if self._granted.get(waiter) == since:  # as it was; a precaution
                    self._look_at_grant(waiter, since, now, due, wakes, told)
            if len(self.line) and any(pool.idle for pool in self.line.pools):
                self._serve(wakes)
            if not self.line.waiting:  # to count them may have been interrupted
                self.line.requests = self.line.requested = 0
        self._tell_refused()
        for waiter in told:
            waiter.wake_from_anywhere()
        self._wake(wakes)
        return due

    def _look_at_lease(self, lease: LeaseState, now: float, due: Due, wakes: list[Waiter]) -> None:
        """Under the lock: what is late, or was interrupted, in a lease."""
        if not lease.open:  # to close it was interrupted
            self._close_lease(lease, wakes)
            return
        if lease.moved is not None or (lease.free and len(lease)):
            self._serve_lease(lease, wakes)
        if lease.in_hands is not None and lease.in_hands() is None:
            # The collector forgets it some time before its finalizer has run.
            lease.gone_since = since = lease.gone_since or now
            if since + PICKUP_SECONDS <= now:
                lease.dropped = True
                due.dropped.append(lease)
                return
            due.by(since + PICKUP_SECONDS)
        if lease.hard_expires_at <= now:
            due.hard.append(lease)
            return
        due.by(lease.hard_expires_at)
        if lease.soft_expiry_told:
            return
        if lease.soft_expires_at <= now:
            lease.soft_expiry_told = True
            due.soft.append(lease)
        else:
            due.by(lease.soft_expires_at)

    def _look_at_slot(self, slot: Slot, now: float, due: Due, wakes: list[Waiter]) -> None:
        """Under the lock: whether the call of a worker is over its time, or nobody has it."""
        call, worker = slot.call, slot.worker
        if worker is None or worker.leaving:
            return
        if call is None:
            self._find_lost(slot, wakes)
        elif call.state == RUNNING or (
            worker.ahead is not None and not self.ahead.may_be_recalled(worker.ahead)
        ):
            self._look_at_call(call, worker, now, due)
        elif call.state != GRANTED:
            # Nobody knows whether the worker is still at it.
            worker.leaving = True
            due.lost.append((worker, call))

    def _look_at_call(self, call: Call, worker: Worker, now: float, due: Due) -> None:
        """Under the lock: end ``worker`` if its call is overdue, or of a closed loop."""
        deadline = worker.deadline
        late = deadline is not None and deadline <= now
        closed = call.home is not None and call.home.is_closed()
        if (late or closed) and not self.ahead.recall(worker) and not closed:
            # Its loop has not read the outcome yet. Another call is running.
            following = worker.ahead
            assert following is not None
            if not following.begun:
                following.begun = now
                seconds = following.timeout
                worker.deadline = deadline = now + seconds if seconds is not None else None
                late = False
            call = following
        if late and worker.ahead is None and worker.has_answered():
            # Its loop is busy, and is given time to read that.
            assert deadline is not None
            deadline += PICKUP_SECONDS
            late = deadline <= now
        if late or closed:
            worker.leaving = True
            lease = worker.slot.lease
            self.ahead.keep_order(self.line if lease is None else lease)
            (due.overdue if late else due.lost).append((worker, call))
        elif deadline is not None:
            due.by(deadline)

    def _look_at_grant(
        self,
        waiter: Waiter,
        since: float,
        now: float,
        due: Due,
        wakes: list[Waiter],
        told: list[Waiter],
    ) -> None:
        """Under the lock: whether what ``waiter`` was granted at ``since`` has been picked up.

        ``told``: those who are to look at what became of it.
        """
        if since + PICKUP_SECONDS > now:
            due.by(since + PICKUP_SECONDS)
            remind = waiter.home is not None and not waiter.reminded
            if remind and since + PICKUP_SECONDS / 5 <= now:
                # Who should have told its loop may have been interrupted.
                waiter.reminded = True
                wakes.append(waiter)
        elif waiter.state != GRANTED:
            # Who took it may have been interrupted before it was done.
            del self._granted[waiter]
            if not isinstance(waiter, Call):
                told.append(waiter)
            elif waiter.state == RUNNING and not waiter.begun:
                assert waiter.worker is not None
                waiter.worker.leaving = True
                due.lost.append((waiter.worker, waiter))
                waiter.state = DONE
                waiter.error = _interrupted(waiter)
                told.append(waiter)
        elif waiter.home is None:
            # A blocking caller picks up as soon as it is woken. Who should have woken it may have
            # been interrupted.
            self._granted[waiter] = now
            due.by(now + PICKUP_SECONDS)
            told.append(waiter)
        else:
            error = LeaseUnavailableError(
                f"What was granted to this caller of {self.name!r} was not picked up within "
                f"{PICKUP_SECONDS:g} s, because its event loop did not run; it went to the "
                "next in line. Do not block or stop the loop while awaiting a worker.",
            )
            self._take_back(waiter, error, wakes)
            told.append(waiter)

    def _find_lost(self, slot: Slot, wakes: list[Waiter]) -> None:
        """Under the lock: free an idle worker that nobody has.

        A signal handler that raises, as for a time limit, may interrupt a blocking caller at any
        point, also here between two steps.
        """
        lease = slot.lease
        if lease is None:
            lost = not slot.pool.closing and slot not in slot.pool.idle
        else:
            lost = not lease.open or slot not in lease.free
        if lost:
            self._free(slot, wakes)

    def expire_softly(self, lease: LeaseState) -> None:
        """Tell that a lease has passed its soft expiry."""
        self._tell(
            Event(
                "lease_expiring",
                self.name,
                f"lease {lease.lease_id} (owner {lease.owner!r}) is past its "
                f"{lease.soft_expires_at - lease.begun:g} s and will be revoked in "
                f"{lease.grace_seconds:g} s; extend() renews it",
                logging.WARNING,
                lease.facts(),
            )
        )

    def _estimate(self) -> float:
        """Under the lock: seconds until whoever comes now has a worker.

        All there is to do before, divided among all workers: what is left of the calls and leases
        that have workers, and those of the line. Each is taken to be as long as the mean of its
        kind. One that has been going on for longer, or the first of its kind, is taken to be half
        done.
        """
        now = monotonic()
        counters = self.counters
        workers = 0
        seconds = 0.0
        for pool in self.line.pools:
            workers += len(pool.slots)
            for slot in pool.slots:
                if slot.lease is not None:
                    passed, usual = now - slot.lease.begun, counters.mean_lease_seconds
                elif slot.call is not None and slot.call.begun:
                    passed, usual = now - slot.call.begun, counters.mean_call_seconds
                else:
                    continue
                seconds += usual - passed if passed < usual else passed
        line = self.line
        if not counters.leases_ended:
            seconds += len(line) * counters.mean_call_seconds
        else:
            seconds += (len(line) - line.requests) * counters.mean_call_seconds
            seconds += line.requested * counters.mean_lease_seconds
        return seconds / (workers or 1)

    def estimated_wait(self) -> float:
        """Seconds a caller who joins the line now may expect to wait."""
        with self.lock:
            return self._estimate()


def _moved(mean: float, value: float, count: int) -> float:
    """The moving average ``mean`` after the ``count``-th ``value``."""
    return mean + (value - mean) * max(0.05, 1 / count)


def _interrupted(call: Call) -> WorkerCrashedError:
    name = call.function_name
    return WorkerCrashedError(
        f"The worker of {name} was killed: a signal handler raised before it had the call.",
        function=name,
    )


def _self(error: BaseException) -> BaseException:
    return error
