"""A dispatcher without processes, and a model that says what it must do.

Callers stand on real event loops, which run when a test says so, or block; workers are stand-ins
that note what they are given. Used by ``test_line``.

Long because the rules of one state machine belong together.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from leasepool_django.backends.base import Worker
from leasepool_django.engine.dispatcher import PICKUP_SECONDS, Dispatcher
from leasepool_django.engine.lease import LeaseState
from leasepool_django.engine.line import (
    DONE,
    GONE,
    GRANTED,
    NEW,
    RUNNING,
    WAITING,
    Call,
    Pool,
    Request,
    Slot,
    Waiter,
)
from leasepool_django.exceptions import (
    LeaseExpiredError,
    LeaseTimeoutError,
    WorkerCrashedError,
)

WORKERS = 2
MAX_POOLS = 3
GIVEN = (GRANTED, RUNNING)
LONG = 1e9  # seconds; a call behind one that takes longer goes first


class StandIn(Worker):
    """A worker that runs nothing. ``dead``: its process has ended, and nobody may know yet.

    ``tray``: the call that was sent ahead and not taken; ``unread``: the one that it has finished,
    and has begun that one after, which nobody has been told yet. ``answered``: it has finished its
    call, likewise.
    """

    answered = False
    # After one was taken back none is sent ahead until a call that was given later has ended.
    barred: Call | bool = False

    def __init__(self, dispatcher: Dispatcher, slot: Slot, begun: list[Call]) -> None:
        self.slot = slot
        self.dead = False
        self.call: Call | None = None
        self.tray: Call | None = None
        self.unread: Call | None = None
        self.tray_is_full = False
        self.error: Callable[[], BaseException] = lambda: WorkerCrashedError("dead")
        self._dispatcher = dispatcher
        self._begun = begun

    def begin(self, call: Call, home: asyncio.AbstractEventLoop, *, eager: bool) -> None:
        assert home is call.home
        self.run_blocking(call)

    def run_blocking(self, call: Call) -> None:
        assert call.state == RUNNING
        assert call.worker is self
        assert self.call is None, "a worker runs one call at a time"
        if self.barred is True:
            self.barred = call
        if self.dead:
            if not self._dispatcher.call_undelivered(self, call):
                call.error = self.error()
                call.wake()
            return
        assert not self.leaving
        self.take(call)
        call.begun = time.monotonic()

    def take(self, call: Call) -> None:
        """The process begins ``call``."""
        assert not self.dead
        assert call not in self._begun, "no call is run twice"
        self._begun.append(call)
        self.call = call

    def may_put_ahead(self, call: Call) -> bool:
        assert self.call is not None, "it would be begun before its turn"
        assert self.call.home is call.home
        return not self.dead and not self.barred

    def put_ahead(self, call: Call) -> bool:
        assert self.tray is None
        if self.tray_is_full:
            return False
        self.tray = call
        return True

    def take_back(self, taken: list[bytes]) -> None:
        if self.tray is not None:
            taken.append(b"")
            self.tray = None
            self.barred = True

    def has_answered(self) -> bool:
        return self.answered

    def is_left(self) -> bool:
        """Whether the one sent ahead is still there; now it is not."""
        taken: list[bytes] = []
        self.take_back(taken)
        return bool(taken)

    def go_on(self) -> None:
        """The process finishes its call and takes the next from its tray."""
        assert self.tray is not None
        self.answered = False
        self.unread, self.call = self.call, None
        following, self.tray = self.tray, None
        self.take(following)

    def kill(self, error: Callable[[], BaseException]) -> None:
        self.error = error
        self.dead = True

    def retire(self) -> None:
        self.dead = True


def new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_debug(False)  # it would note where each of many callbacks comes from
    return loop


class Account(RuleBasedStateMachine):
    """All that can happen to a dispatcher, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(
            "model",
            max_waiting=None,
            tell=lambda event: None,
            grow=self.note_growth,
            retire=self.note_retirement,
            idle_while_closed=lambda: None,
        )
        self.dispatcher.max_pools = MAX_POOLS
        self.dispatcher.ahead.seconds = LONG
        self.dispatcher.closed = None
        self.growth_asked = False
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.workers: list[StandIn] = []  # in service, or dead and not both sides know
        self.begun: list[Call] = []
        self.given_up: set[Waiter] = set()
        # The model: all who ever came, in order, to the manager's line (None) or a lease's.
        self.came: dict[LeaseState | None, list[Waiter]] = {None: []}
        self.states: dict[Waiter, int] = {}
        # Somebody was interrupted, which may cost a worker, and the numbers may be off by one.
        self.interrupted = False

    def note_growth(self) -> None:
        self.growth_asked = True

    def wants_growth(self) -> bool:
        return self.growth_asked

    def note_retirement(self, slot: Slot) -> None:
        assert slot.worker is not None
        assert slot.call is None
        assert not slot.worker.leaving
        slot.worker.leaving = True
        slot.worker.retire()

    @initialize()
    def open(self) -> None:
        self.loops = [new_loop() for _ in range(2)]
        self.dispatcher.add_pool(Pool(0, WORKERS))
        for slot in self.vacant():
            self.start(slot)

    # -- callers -----------------------------------------------------------------------------------

    callers = st.integers(0, 2)  # on the first loop, on the second, or blocking

    def arrive(self, waiter: Waiter, line: LeaseState | None) -> None:
        self.came.setdefault(line, []).append(waiter)
        self.states[waiter] = NEW
        if waiter.home is not None:
            waiter.future = waiter.home.create_future()
        else:
            waiter.wakeup = threading.Lock()
            waiter.wakeup.acquire()

    def home(self, caller: int) -> asyncio.AbstractEventLoop | None:
        return self.loops[caller] if caller < 2 else None

    def run_on(self, worker: Worker | None, call: Call) -> None:
        if worker is not None:
            worker.run_blocking(call)

    @rule(caller=callers)
    def call(self, caller: int) -> None:
        call = Call(self.home(caller), print, b"", None)
        self.arrive(call, None)
        self.run_on(self.dispatcher.begin(call), call)

    @rule(caller=st.integers(0, 1), data=st.data())
    def crowd(self, caller: int, data: st.DataObject) -> None:
        """Many calls of one loop, so that there is something to send ahead."""
        lease = data.draw(st.sampled_from([None, *(one for one in self.leases() if one.open)]))
        for _ in range(2 * WORKERS):
            call = Call(self.home(caller), print, b"", None)
            self.arrive(call, lease)
            if lease is None:
                self.run_on(self.dispatcher.begin(call), call)
            else:
                self.run_on(self.dispatcher.begin_in(lease, call), call)

    @rule(caller=callers, workers=st.integers(1, WORKERS))
    def acquire(self, caller: int, workers: int) -> None:
        request = Request(self.home(caller), workers, None, math.inf, 0.0)
        self.arrive(request, None)
        self.dispatcher.request(request, wait=True)

    def those(self, *states: int) -> list[Waiter]:
        """Everybody in one of these states who has not given up."""
        return [
            waiter
            for line in self.came.values()
            for waiter in line
            if waiter.state in states and waiter not in self.given_up
        ]

    def leases(self) -> list[LeaseState]:
        """The leases in their holders' hands: those in force, and the last that is over."""
        requests = [one for one in self.those(RUNNING) if isinstance(one, Request)]
        leases = [request.lease for request in requests if request.lease is not None]
        over = [lease for lease in leases if not lease.open]
        return [lease for lease in leases if lease.open] + over[-1:]

    @precondition(lambda self: bool(self.leases()))
    @rule(data=st.data(), caller=callers)
    def call_in_lease(self, data: st.DataObject, caller: int) -> None:
        lease = data.draw(st.sampled_from(self.leases()))
        call = Call(self.home(caller), print, b"", None)
        if lease.open:
            self.arrive(call, lease)
            self.run_on(self.dispatcher.begin_in(lease, call), call)
        else:
            with pytest.raises(LeaseExpiredError):
                self.dispatcher.begin_in(lease, call)

    @precondition(lambda self: bool(self.leases()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases()))
        was_open = lease.open
        assert self.dispatcher.release(lease) is was_open

    @rule(data=st.data())
    def disturb(self, data: st.DataObject) -> None:
        """What happens more rarely; one rule, so that it does."""
        what = [self.close_loop, self.look_later, self.change_size]
        what += [self.revoke] * bool(self.leases())
        what += [self.give_up] * 2 * bool(self.may_give_up())
        what += [self.time_out] * bool(self.those(WAITING))
        what += [self.die] * 2 * bool(self.workers)
        data.draw(st.sampled_from(what))(data)

    def revoke(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases()))
        assert self.dispatcher.revoke(lease) is None, "it is not over"
        lease.hard_expires_at = 0.0
        for worker in self.dispatcher.revoke(lease) or ():
            assert worker.leaving
            worker.kill(lease.refusal)

    def may_give_up(self) -> list[Waiter]:
        """Everybody whose outcome has not arrived; who has used a lease, has it already."""
        return [
            one
            for one in self.those(WAITING, *GIVEN)
            if not (isinstance(one, Request) and one.lease in self.came and one.state == RUNNING)
        ]

    def give_up(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.may_give_up()))
        self.given_up.add(waiter)
        answered = isinstance(waiter, Call) and waiter.worker and waiter.worker.has_answered()
        worker = self.dispatcher.abandon(waiter)
        if worker is not None:
            assert waiter.home is None or not answered, "its worker is free"
            assert isinstance(worker, StandIn)
            assert worker.call is waiter, "nobody else's call is stopped"
            worker.kill(asyncio.CancelledError)

    def time_out(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.those(WAITING)))
        if not self.dispatcher.leave(waiter, lambda: LeaseTimeoutError("late")):
            assert waiter in self.begun, "it is in line no more"
        assert not self.dispatcher.leave(waiter, lambda: LeaseTimeoutError("late"))

    @rule(which=st.sampled_from([(0,), (1,), (0, 1)]))
    def run_loops(self, which: tuple[int, ...]) -> None:
        for loop in which:
            self.loops[loop].call_soon(self.loops[loop].stop)
            self.loops[loop].run_forever()

    @rule()
    def wake_blocking(self) -> None:
        """The blocking callers that were told look at what they got."""
        for waiter in self.those(WAITING, *GIVEN):
            told = waiter.wakeup is not None and waiter.wakeup.acquire(blocking=False)
            if told and self.dispatcher.take_up(waiter) and isinstance(waiter, Call):
                self.run_on(waiter.worker, waiter)

    def close_loop(self, data: st.DataObject) -> None:
        """A loop dies with all that awaits on it; another takes its place."""
        loop = data.draw(st.integers(0, 1))
        closed, self.loops[loop] = self.loops[loop], new_loop()
        closed.close()
        lost = [one for line in self.came.values() for one in line if one.home is closed]
        self.given_up.update(lost)
        for waiter in lost:
            if isinstance(waiter, Request) and waiter.state == RUNNING and waiter.lease is not None:
                self.dispatcher.release(waiter.lease)  # as the garbage collector does

    def look_later(self, data: st.DataObject | None = None) -> None:
        """What loops that do not run have not picked up is withdrawn."""
        stopped = [one for one in self.those(GRANTED) if one.home is not None]
        due = self.dispatcher.look(time.monotonic() + PICKUP_SECONDS)
        for worker, call in due.overdue + due.lost:
            # Or it had ended already when it was given up, and its loop has still not read that.
            closed = call.home is not None and call.home.is_closed()
            assert closed or call in self.given_up or self.interrupted
            worker.kill(lambda: WorkerCrashedError("overdue"))
        assert all(waiter.state == GONE for waiter in stopped)
        assert not due.soft
        assert not due.hard

    # -- workers -----------------------------------------------------------------------------------

    def busy(self) -> list[StandIn]:
        """The workers whose call ends where somebody sees it."""
        return [
            worker
            for worker in self.workers
            if worker.call and not (worker.call.home and worker.call.home.is_closed())
        ]

    def end_call(self, worker: StandIn, *, retiring: bool, takes_ahead: bool = True) -> None:
        """Somebody reads what the worker has said, or that its process has ended."""
        worker.answered = False
        call, worker.unread = worker.unread, None
        if call is not None:
            retiring, takes_ahead = False, True
        else:
            call, worker.call = worker.call, None
        assert call is not None
        if worker.barred is call:
            worker.barred = False
        following = self.dispatcher.call_ended(
            worker, call, call.home, retiring=retiring, takes_ahead=takes_ahead
        )
        if following is not None:
            assert following.home is not None
            assert following.home is call.home
            if following is worker.call:
                pass  # it had begun before
            elif following.ahead is not worker:
                worker.begin(following, following.home, eager=False)
            elif worker.dead:
                assert worker.is_left()
                assert self.dispatcher.call_undelivered(worker, following, suspect=False)
            else:
                assert worker.is_left()
                assert takes_ahead
                worker.take(following)
                following.begun = time.monotonic()
            self.dispatcher.look_ahead(worker, following.home)
        if call.home is None:
            call.wake()
        else:
            call.home.call_soon_threadsafe(call.wake)

    @precondition(lambda self: any(not worker.dead for worker in self.busy()))
    @rule(data=st.data(), retiring=st.sampled_from([False, False, True]), plain=st.booleans())
    def finish(self, data: st.DataObject, *, retiring: bool, plain: bool) -> None:
        worker = data.draw(st.sampled_from([one for one in self.busy() if not one.dead]))
        worker.dead = worker.dead or (retiring and worker.unread is None)
        self.end_call(worker, retiring=retiring, takes_ahead=plain and not retiring)

    @precondition(lambda self: any(not worker.dead for worker in self.busy()))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A worker has finished its call, and its loop has not read that yet."""
        worker = data.draw(st.sampled_from([one for one in self.busy() if not one.dead]))
        worker.answered = True

    def have_more(self) -> list[StandIn]:
        """The workers that may go on by themselves."""
        return [
            worker
            for worker in self.workers
            if worker.call and worker.tray and not worker.dead and not worker.unread
        ]

    @rule(go_on=st.booleans(), full=st.sampled_from([False, False, True]), old=st.booleans())
    def look_ahead(self, *, go_on: bool, full: bool, old: bool) -> None:
        """Every busy worker may be sent another call, and go on with it.

        ``full``: or the system refuses to take it; ``old``: their calls have been running for long.
        """
        for worker in self.busy():
            worker.tray_is_full = full
            if worker.call and old:
                worker.call.begun -= 1.1 * LONG
            if worker.call and worker.call.home and not worker.unread and not worker.tray:
                self.dispatcher.look_ahead(worker, worker.call.home)
        for worker in self.have_more() if go_on else ():
            worker.go_on()

    @precondition(lambda self: bool(self.have_more()))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.have_more())).go_on()

    def die(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.workers)).dead = True

    @precondition(lambda self: any(worker.dead for worker in self.busy()))
    @rule(data=st.data())
    def tell_the_caller(self, data: st.DataObject) -> None:
        """Who waits for a call learns that its worker has died."""
        self.tell_of_death(data.draw(st.sampled_from([one for one in self.busy() if one.dead])))

    def tell_of_death(self, worker: StandIn) -> None:
        if worker.unread is None:
            assert worker.call is not None
            worker.call.error = worker.error()
        self.end_call(worker, retiring=True)

    @precondition(lambda self: any(worker.dead for worker in self.workers))
    @rule(data=st.data(), replaced=st.booleans())
    def tell_the_housekeeper(self, data: st.DataObject, *, replaced: bool) -> None:
        """The kernel reports a process gone; its successor may be ready at once, or later."""
        worker = data.draw(st.sampled_from([one for one in self.workers if one.dead]))
        slot = worker.slot
        self.dispatcher.worker_dead(worker)
        if slot.worker is worker and self.dispatcher.slot_gone(slot) and replaced:
            self.start(slot)
        if worker.call is None or worker not in self.busy():
            self.workers.remove(worker)

    def vacant(self) -> list[Slot]:
        pools = self.dispatcher.line.pools
        return [slot for pool in pools for slot in pool.slots if slot.worker is None]

    def start(self, slot: Slot) -> None:
        worker = StandIn(self.dispatcher, slot, self.begun)
        self.workers.append(worker)
        self.dispatcher.slot_ready(slot, worker)

    @precondition(lambda self: bool(self.vacant()))
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        self.start(data.draw(st.sampled_from(self.vacant())))

    @precondition(lambda self: self.wants_growth())
    @rule()
    def grow(self) -> None:
        self.growth_asked = False
        if self.dispatcher.may_grow():
            self.dispatcher.add_pool(Pool(0, WORKERS))

    def change_size(self, data: st.DataObject) -> None:
        target = data.draw(st.integers(1, MAX_POOLS))
        while self.dispatcher.lacks_pool(target):
            self.dispatcher.add_pool(Pool(0, WORKERS))
        self.dispatcher.close_pools_above(target)

    # -- what holds at any moment ------------------------------------------------------------------

    @invariant()
    def nobody_is_overtaken(self) -> None:
        for key, line in self.came.items():
            kept = self.dispatcher.line if key is None else key
            here = [waiter for waiter in line if waiter.state == WAITING]
            ahead = [one for one in here if one.ahead is not None]
            assert set(kept.ahead) <= set(ahead)
            assert all(one in self.begun for one in ahead if one not in kept.ahead)
            waiting = [waiter for waiter in here if waiter not in ahead]
            assert list(kept.waiting) == waiting
            for waiter in line:
                # One that its worker has begun counts from then on, whoever has noticed.
                now = RUNNING if waiter in ahead and waiter in self.begun else waiter.state
                before, self.states[waiter] = self.states[waiter], now
                if before in (NEW, WAITING) and now in GIVEN:
                    assert all(line.index(waiter) < line.index(other) for other in waiting)

    @invariant()
    def those_who_want_leases_are_counted(self) -> None:
        line = self.dispatcher.line
        requests = [one for one in line.waiting if isinstance(one, Request)]
        assert line.requests == len(requests)
        assert line.requested == sum(request.workers for request in requests)
        assert line.moved is None

    @invariant()
    def every_worker_is_in_one_place(self) -> None:
        pools = self.dispatcher.line.pools
        assert len(pools) <= MAX_POOLS
        for pool in pools:
            assert len(pool.slots) <= WORKERS
            assert len(set(pool.idle)) == len(pool.idle)
            for slot in pool.slots:
                lease = slot.lease
                places = (slot in pool.idle) + (lease is not None and lease.free.count(slot))
                places += slot.call is not None
                out_of_service = slot.worker is None or slot.worker.leaving
                assert places == 1 or (out_of_service and not places)
                if out_of_service:
                    assert slot not in pool.idle
                    assert lease is None or slot not in lease.free
                if slot.call is not None:
                    assert slot.call.slot is slot
                    assert slot.call.worker is slot.worker
                    assert slot.call.lease is lease
                elif lease is not None:
                    assert lease.open or (slot.worker is not None and slot.worker.leaving)
                    assert slot not in pool.idle
        for lease in self.dispatcher.leases:
            assert lease.open
            assert len(lease.slots) <= lease.workers
            assert all(slot.lease is lease for slot in lease.slots)

    @invariant()
    def no_worker_is_withheld(self) -> None:
        head = self.dispatcher.line.head
        if head is not None:
            pools = self.dispatcher.line.pools
            assert all(len(pool.idle) < head.workers for pool in pools)
            assert self.wants_growth() or not self.dispatcher.may_grow()
        for lease in self.dispatcher.leases:
            assert not (lease.free and (lease.waiting or lease.ahead))

    # -- what holds in the end ---------------------------------------------------------------------

    def teardown(self) -> None:
        if self.loops:
            self.settle()
            for loop in self.loops:
                loop.close()

    def settle(self) -> None:
        """Let everything come to its end."""
        for _ in range(20 + 4 * len(self.states)):
            self.run_loops((0, 1))
            self.wake_blocking()
            for lease in self.leases():
                self.dispatcher.release(lease)
            for worker in list(self.workers):
                if worker in self.busy() and not worker.dead:
                    self.end_call(worker, retiring=False)
                elif worker in self.busy():
                    self.tell_of_death(worker)
                elif worker.dead:
                    self.dispatcher.worker_dead(worker)
                    if worker.slot.worker is worker:
                        self.dispatcher.slot_gone(worker.slot)
                    self.workers.remove(worker)
            self.look_later()
            for slot in self.vacant():
                self.start(slot)
            self.nobody_is_overtaken()
            self.every_worker_is_in_one_place()
            if not self.those(WAITING, *GIVEN) and all(
                len(pool.idle) == len(pool.slots) for pool in self.dispatcher.line.pools
            ):
                break
        self.nothing_is_lost()

    def nothing_is_lost(self) -> None:
        assert self.dispatcher.line.pools
        for pool in self.dispatcher.line.pools:
            assert set(pool.idle) == set(pool.slots)
            assert all(slot.lease is None and slot.call is None for slot in pool.slots)
        assert not self.dispatcher.leases
        assert not len(self.dispatcher.line)
        for line in self.came.values():
            for waiter in line:
                if waiter in self.given_up:
                    continue
                if waiter.state == GONE:
                    assert waiter.error is not None
                elif isinstance(waiter, Call):
                    assert waiter.state == DONE
                    assert waiter in self.begun or waiter.error is not None
        assert self.dispatcher.counters.calls_started == len(self.begun) or self.interrupted
