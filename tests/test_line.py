"""The account of workers and callers: no order of events loses, doubles or overtakes anything.

The state machine finds orders by itself; those that have to be just so have tests of their own.

Long because these share the ways in which a moment is brought about.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from functools import partial
from time import monotonic, thread_time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from leasepool_django.engine.dispatcher import MAX_DELIVERIES, PICKUP_SECONDS
from leasepool_django.engine.lease import LeaseState
from leasepool_django.engine.line import (
    DONE,
    GONE,
    GRANTED,
    RUNNING,
    WAITING,
    Call,
    Pool,
    Request,
    Waiter,
)
from leasepool_django.exceptions import (
    CallTimeoutError,
    LeaseExpiredError,
    LeasePoolNotStartedError,
    LeaseTimeoutError,
    WorkerCrashedError,
)
from tests.account import MAX_POOLS, WORKERS, Account, StandIn

BLOCKING = 2


def test_no_order_of_events_loses_doubles_or_overtakes_anything() -> None:
    run_state_machine_as_test(
        Account, settings=settings(max_examples=120, stateful_step_count=50, deadline=None)
    )


@pytest.fixture
def account() -> Iterator[Account]:
    """A dispatcher with one pool of two workers; in the end nothing may be lost."""
    account = Account()
    account.open()
    yield account
    account.teardown()


def ask(account: Account, caller: int = 0) -> Call:
    """Ask for a one-shot call; it runs if there is a worker."""
    account.call(caller)
    call = account.came[None][-1]
    assert isinstance(call, Call)
    return call


def ask_for_lease(account: Account, workers: int = WORKERS, caller: int = 0) -> Request:
    account.acquire(caller, workers)
    request = account.came[None][-1]
    assert isinstance(request, Request)
    return request


def ask_in(account: Account, lease: LeaseState, caller: int = 0) -> Call:
    call = Call(account.home(caller), print, b"", None)
    account.arrive(call, lease)
    account.run_on(account.dispatcher.begin_in(lease, call), call)
    return call


def worker_of(call: Call) -> StandIn:
    assert isinstance(call.worker, StandIn)
    return call.worker


def bury(account: Account, worker: StandIn) -> None:
    """The worker is dead, and its slot has a successor; whoever waits for its call is untold."""
    worker.dead = True
    assert account.dispatcher.slot_gone(worker.slot)
    account.start(worker.slot)


def fill_all(account: Account) -> list[Call]:
    """Give every worker of every pool a call."""
    dispatcher = account.dispatcher
    while dispatcher.lacks_pool(MAX_POOLS):
        dispatcher.add_pool(Pool(0, WORKERS))
    for slot in account.vacant():
        account.start(slot)
    return [ask(account) for _ in range(MAX_POOLS * WORKERS)]


def test_giving_up_a_call_whose_worker_has_died_stops_nobody_elses(account: Account) -> None:
    """The successor in the same place may run another caller's call by then."""
    first = fill_all(account)[0]
    bury(account, worker_of(first))
    other = ask(account, caller=1)
    assert worker_of(other).slot is worker_of(first).slot
    assert account.dispatcher.abandon(first) is worker_of(first)
    account.given_up.add(first)
    assert not worker_of(other).leaving
    assert worker_of(other).call is other


def test_a_lease_that_is_over_has_no_place_whose_worker_is_still_to_come(account: Account) -> None:
    lease = ask_for_lease(account).lease
    assert lease is not None
    pools = account.dispatcher.line.pools
    slot = pools[0].slots[0]
    assert isinstance(slot.worker, StandIn)
    account.workers.remove(slot.worker)
    assert account.dispatcher.slot_gone(slot)
    assert [pool.in_use for pool in pools] == [True]
    assert account.dispatcher.release(lease)
    assert [pool.in_use for pool in pools] == [False]
    account.start(slot)
    assert len(pools[0].idle) == WORKERS


def test_those_who_were_sent_ahead_want_another_pool_as_well(account: Account) -> None:
    for _ in range(WORKERS * 2):
        ask(account)
    account.look_ahead(go_on=False, full=False, old=False)
    account.grow()
    account.start(account.vacant()[0])
    line = account.dispatcher.line
    assert (len(line.ahead), len(line.waiting)) == (WORKERS - 1, 0)
    assert account.wants_growth()


@pytest.mark.parametrize("end", ["retires", "dies", "is given up", "is late", "died before"])
def test_who_was_sent_ahead_is_not_begun_before_one_that_came_earlier_and_came_back(
    account: Account, end: str
) -> None:
    running = [ask(account) for _ in range(WORKERS)]
    waiting = [ask(account) for _ in range(WORKERS + 1)]
    # The first to be sent another call is the last that was given one.
    *others, worker = map(worker_of, running)
    call = running[-1]
    if end == "died before":  # its call, and could not read this one
        for other in others:
            account.dispatcher.look_ahead(other, account.loops[0])
        worker.dead, worker.call = True, None
        account.begun.remove(call)
        waiting.insert(0, call)
        assert account.dispatcher.call_undelivered(worker, call)
    else:
        account.look_ahead(go_on=False, full=False, old=False)
        assert [one.ahead for one in waiting] == [worker, *others, None]
    match end:
        case "retires":
            worker.dead = True
            account.end_call(worker, retiring=True, takes_ahead=False)
        case "dies":
            worker.dead = True
            account.dispatcher.worker_dead(worker)
        case "is given up":
            account.given_up.add(call)
            assert account.dispatcher.abandon(call) is worker
            worker.kill(asyncio.CancelledError)
        case "is late":
            worker.deadline = monotonic()
            assert account.dispatcher.look(monotonic()).overdue == [(worker, call)]
            worker.kill(partial(CallTimeoutError, "late"))
    assert list(account.dispatcher.line.waiting) == waiting
    assert not account.have_more()


def test_nor_before_one_that_came_back_while_an_earlier_one_was_served(account: Account) -> None:
    """A worker that has to settle something takes no call from its tray, nor another one there."""
    running = fill_all(account)[:4]
    waiting = [ask(account) for _ in range(2 * len(account.workers))]
    first, middle, last = (worker_of(call) for call in running[:3])
    for worker in (first, middle, last):
        account.dispatcher.look_ahead(worker, account.loops[0])
    assert [worker.tray for worker in (first, middle, last)] == waiting[:3]
    running[0].begun -= 2 * account.dispatcher.ahead.seconds  # it takes so long
    account.end_call(middle, retiring=False, takes_ahead=False)
    assert middle.call is waiting[0]
    assert middle.barred is waiting[0]
    assert list(account.dispatcher.line.waiting) == waiting[1:]


def test_a_time_limit_that_was_over_while_a_dead_worker_was_granted_holds(account: Account) -> None:
    def late() -> LeaseTimeoutError:
        return LeaseTimeoutError("late")

    def time_out(waiter: Waiter, seconds: float) -> None:
        account.dispatcher.leave(waiter, late)

    account.dispatcher.time_out = time_out
    running = fill_all(account)
    blocking = worker_of(running[0])
    call = ask(account)
    call.patience = 0.0
    running[0].home = None  # so that another thread frees the worker
    account.end_call(blocking, retiring=False)
    assert call.state == GRANTED
    assert not account.dispatcher.leave(call, late)
    blocking.dead = True
    for _ in range(3):  # it is picked up, is not delivered, and has waited too long
        account.run_loops((0,))
    assert call.state == GONE
    assert isinstance(call.error, LeaseTimeoutError)
    account.given_up.add(call)


def test_time_with_a_worker_that_turns_out_dead_is_no_waiting(account: Account) -> None:
    call = ask(account)
    worker = worker_of(call)
    call.patience = 60.0
    call.begun -= 1000.0
    limits: list[float] = []

    def arm(left: Any, time_out: Any, *arguments: Any) -> None:
        limits.append(left)

    assert call.home is not None
    call.home.call_later = arm  # type: ignore[method-assign, assignment]
    account.dispatcher.time_out = lambda waiter, seconds: None
    worker.dead, worker.call = True, None
    account.begun.remove(call)
    assert account.dispatcher.call_undelivered(worker, call)
    account.run_loops((0,))
    assert 59.0 < limits[0] <= 60.0
    del call.home.call_later


def test_a_lease_is_missed_for_a_while_before_it_is_taken_for_dropped(account: Account) -> None:
    """The collector forgets the object of a lease before its finalizer has given it back."""
    lease = ask_for_lease(account).lease
    assert lease is not None
    lease.in_hands = lambda: None
    now = monotonic()
    assert not account.dispatcher.look(now).dropped
    assert account.dispatcher.look(now + 1).next_look <= now + PICKUP_SECONDS
    assert account.dispatcher.look(now + PICKUP_SECONDS).dropped == [lease]


def test_the_end_of_a_dead_workers_call_leaves_its_successor_alone(account: Account) -> None:
    first = fill_all(account)[0]
    bury(account, worker_of(first))
    other = ask(account, caller=1)
    waiting = ask(account)
    worker_of(first).call = None
    first.error = WorkerCrashedError("dead")
    assert account.dispatcher.call_ended(worker_of(first), first, first.home, retiring=True) is None
    assert first.state == DONE
    assert worker_of(other).slot.call is other
    assert waiting.state == WAITING


def test_a_call_granted_to_a_worker_that_dies_before_it_is_picked_up_gets_another(
    account: Account,
) -> None:
    calls = fill_all(account)
    late = ask(account, caller=1)
    account.end_call(worker_of(calls[0]), retiring=False)
    assert late.state == GRANTED
    dead = worker_of(late)
    bury(account, dead)
    other = ask(account)
    assert worker_of(other).slot is dead.slot
    account.run_loops((1,))
    assert late.state == WAITING
    account.end_call(worker_of(calls[1]), retiring=False)
    account.run_loops((1,))
    assert late.state == RUNNING
    assert worker_of(late) is worker_of(calls[1])


def test_calls_that_dead_workers_never_received_keep_their_order(account: Account) -> None:
    calls = fill_all(account)
    waiting = [ask(account, caller=1) for _ in range(5)]
    for call in calls[:3]:
        account.end_call(worker_of(call), retiring=False)
    assert [call.state for call in waiting] == [GRANTED] * 3 + [WAITING] * 2
    for call in waiting[:3]:
        worker_of(call).dead = True
    account.run_loops((1,))
    assert list(account.dispatcher.line.waiting) == waiting


@pytest.mark.parametrize("begun", [False, True])
def test_one_that_was_served_at_once_goes_before_all_who_came_after_it(
    account: Account,
    begun: bool,  # noqa: FBT001
) -> None:
    """Its thread was so slow to begin it that others came meanwhile, and its worker died."""
    first, *_ = fill_all(account)
    waiting = [ask(account) for _ in range(3)]
    first.begun = monotonic() if begun else 0.0
    worker = worker_of(first)
    worker.dead = True
    account.dispatcher.call_undelivered(worker, first)
    assert list(account.dispatcher.line.waiting) == [first, *waiting]
    worker.call = None
    bury(account, worker)


def test_calls_of_a_lease_keep_their_order_too(account: Account) -> None:
    lease = ask_for_lease(account).lease
    assert lease is not None
    calls = [ask_in(account, lease) for _ in range(WORKERS)]
    waiting = [ask_in(account, lease, caller=1) for _ in range(4)]
    for call in calls:
        account.end_call(worker_of(call), retiring=False)
    assert [call.state for call in waiting] == [GRANTED, GRANTED, WAITING, WAITING]
    for call in waiting[:2]:
        worker_of(call).dead = True
    account.run_loops((1,))
    assert list(lease.waiting) == waiting


@pytest.mark.parametrize("caller", [0, BLOCKING])
def test_a_call_that_no_worker_receives_fails_in_the_end(account: Account, caller: int) -> None:
    for worker in account.workers:
        worker.dead = True
    call = ask(account, caller)
    for _ in range(MAX_DELIVERIES):
        for slot in {worker.slot for worker in account.workers}:
            if slot.worker is not None and slot.worker.leaving:
                account.dispatcher.slot_gone(slot)
                account.start(slot)
                account.workers[-1].dead = True
        account.run_loops((0,))
        account.wake_blocking()
    assert call.state == DONE
    assert isinstance(call.error, WorkerCrashedError)
    assert account.dispatcher.counters.calls_started == 0


def test_a_call_that_was_not_received_is_refused_when_its_lease_is_over(account: Account) -> None:
    lease = ask_for_lease(account).lease
    assert lease is not None
    running = ask_in(account, lease)
    account.dispatcher.release(lease)
    worker = worker_of(running)
    worker.call, worker.dead = None, True
    account.begun.remove(running)
    assert account.dispatcher.call_undelivered(worker, running)
    assert isinstance(running.error, LeaseExpiredError)
    account.run_loops((0,))
    assert running.future is not None
    assert running.future.done()


@pytest.mark.parametrize("caller", [0, BLOCKING])
def test_a_revoked_lease_spares_the_worker_of_a_call_that_was_not_picked_up(
    account: Account, caller: int
) -> None:
    lease = ask_for_lease(account, workers=1).lease
    assert lease is not None
    running = ask_in(account, lease)
    granted = ask_in(account, lease, caller=caller if caller == BLOCKING else 1)
    account.end_call(worker_of(running), retiring=False)
    assert granted.state == GRANTED
    lease.hard_expires_at = 0.0
    assert account.dispatcher.revoke(lease) == []
    assert granted.state == GONE
    assert isinstance(granted.error, LeaseExpiredError)
    assert not account.dispatcher.take_up(granted)
    assert not worker_of(granted).leaving
    account.run_loops((0, 1))
    account.wake_blocking()
    assert ask_for_lease(account).lease is not None


def test_a_pool_that_has_closed_makes_room_for_one_that_is_wanted(account: Account) -> None:
    dispatcher = account.dispatcher
    calls = fill_all(account)
    for call in calls[-WORKERS:]:
        account.end_call(worker_of(call), retiring=False)
    closing = [worker for worker in account.workers if worker.call is None]
    dispatcher.close_pools_above(1)
    assert all(worker.leaving for worker in closing)
    waiting = ask_for_lease(account)
    assert waiting.state == WAITING
    assert not account.wants_growth()
    for worker in closing:
        assert not dispatcher.slot_gone(worker.slot)
        account.workers.remove(worker)
    assert account.wants_growth()
    account.grow()
    for slot in account.vacant():
        account.start(slot)
    assert waiting.state == GRANTED


def test_a_loop_that_has_died_with_many_waiting_is_passed_over_at_once(account: Account) -> None:
    """More callers than the interpreter allows nested calls."""
    calls = fill_all(account)
    lost = [ask(account, caller=1) for _ in range(1500)]
    last = ask(account)
    account.loops[1].close()
    account.given_up.update(lost)
    account.loops[1] = asyncio.new_event_loop()
    account.end_call(worker_of(calls[0]), retiring=False)
    assert last.state in (GRANTED, RUNNING)
    assert {call.state for call in lost} == {GONE}


def test_what_is_given_up_while_others_are_told_is_not_told_of(account: Account) -> None:
    """Another thread may do so between the grant and the telling."""

    class Telling:
        def release(self) -> None:
            assert account.dispatcher.abandon(second) is None
            account.given_up.add(second)

        def acquire(self, *, blocking: bool) -> bool:
            return True

    calls = fill_all(account)
    large = ask_for_lease(account, caller=1)
    first = ask(account, caller=BLOCKING)
    second = ask(account, caller=1)
    first.wakeup = Telling()  # type: ignore[assignment]
    for call in (calls[0], calls[WORKERS]):  # of two pools: no room for the large request
        account.end_call(worker_of(call), retiring=False)
    assert account.dispatcher.leave(large, lambda: LeaseTimeoutError("late"))
    assert (first.state, second.state) == (GRANTED, GONE)
    account.run_loops((1,))
    assert second.state == GONE


def test_a_call_that_was_given_up_is_not_delivered_again(account: Account) -> None:
    call = ask(account)
    worker = worker_of(call)
    assert account.dispatcher.abandon(call) is worker
    account.given_up.add(call)
    worker.call, worker.dead = None, True
    assert account.dispatcher.call_undelivered(worker, call)
    assert call.state == GONE
    assert not account.dispatcher.line.waiting


@pytest.fixture
def closed() -> Iterator[Account]:
    """As ``account``; but the test closes it, and nothing settles any more."""
    account = Account()
    account.open()
    yield account
    for loop in account.loops:
        loop.close()


def test_a_call_that_was_not_received_is_refused_by_a_manager_that_stops(closed: Account) -> None:
    call = ask(closed)
    closed.dispatcher.close("is stopping", lambda: None)
    worker = worker_of(call)
    worker.dead = True
    assert closed.dispatcher.call_undelivered(worker, call)
    assert isinstance(call.error, LeasePoolNotStartedError)
    closed.run_loops((0,))
    assert call.future is not None
    assert call.future.done()


def test_all_who_wait_are_refused_when_the_manager_stops(closed: Account) -> None:
    """Those on closed loops need not be told."""
    fill_all(closed)
    waiting = [ask(closed, caller) for caller in (0, 1, BLOCKING)]
    closed.loops[1].close()
    closed.dispatcher.close("is stopping", lambda: None)
    assert [type(call.error) for call in waiting] == [LeasePoolNotStartedError] * 3
    closed.run_loops((0,))
    assert waiting[0].future is not None
    assert waiting[0].future.done()
    assert waiting[2].wakeup is not None
    assert waiting[2].wakeup.acquire(blocking=False)
    with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
        ask(closed)
    with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
        ask_for_lease(closed)


def test_a_grant_that_is_refused_by_a_stop_is_no_call_that_has_started(closed: Account) -> None:
    calls = fill_all(closed)
    late = [ask(closed, caller=1), ask(closed, caller=BLOCKING)]
    for call in calls[:2]:
        closed.end_call(worker_of(call), retiring=False)
    assert [call.state for call in late] == [GRANTED, GRANTED]
    closed.dispatcher.close("is stopping", lambda: None)
    busy = closed.dispatcher.end()
    assert set(busy) == {worker_of(call) for call in calls[2:]}
    assert all(worker.leaving for worker in closed.workers)
    assert [call.state for call in late] == [GONE, GONE]
    assert {type(call.error) for call in late} == {LeasePoolNotStartedError}
    assert not closed.dispatcher.take_up(late[1])
    closed.run_loops((1,))
    assert late[0].future is not None
    assert late[0].future.done()
    assert closed.dispatcher.counters.calls_started == len(calls)


def two_at_one_worker(account: Account) -> tuple[StandIn, Call, Call]:
    """A worker that has finished the first call, which nobody has read, and begun the second."""
    first, _ = ask(account), ask(account)
    waiting = [ask(account) for _ in range(3)]
    worker = worker_of(first)
    assert first.home is not None
    account.dispatcher.look_ahead(worker, first.home)
    assert worker.tray is waiting[0]
    worker.go_on()
    return worker, first, waiting[0]


def test_calls_are_sent_ahead_within_a_lease_if_as_many_wait_as_it_has_workers(
    account: Account,
) -> None:
    lease = ask_for_lease(account).lease
    assert lease is not None
    running = [ask_in(account, lease) for _ in range(WORKERS)]
    worker, home = worker_of(running[0]), running[0].home
    assert home is not None
    first = ask_in(account, lease)
    account.dispatcher.look_ahead(worker, home)
    assert not lease.ahead
    ask_in(account, lease)
    account.dispatcher.look_ahead(worker, home)
    assert worker.tray is first


def test_one_sent_ahead_to_a_worker_that_is_to_leave_goes_to_another(account: Account) -> None:
    first, _ = ask(account), ask(account)
    waiting = [ask(account) for _ in range(3)]
    worker = worker_of(first)
    assert first.home is not None
    account.dispatcher.look_ahead(worker, first.home)
    assert [*account.dispatcher.line.ahead] == waiting[:1]
    worker.leaving = True
    account.end_call(worker, retiring=False)
    assert not worker.is_left()
    assert list(account.dispatcher.line.waiting) == waiting
    worker.dead = True


def test_what_is_expected_of_many_that_wait_is_known_at_once(account: Account) -> None:
    """Each that times out is told, and many do so together."""
    lease = ask_for_lease(account).lease
    assert lease is not None
    account.dispatcher.release(lease)
    ask_for_lease(account)

    def seconds_to_tell() -> float:
        begun = thread_time()
        for _ in range(200):
            account.dispatcher.estimated_wait()
        return thread_time() - begun

    few = min(seconds_to_tell() for _ in range(5))
    for _ in range(5_000):
        account.dispatcher.begin(Call(account.home(0), print, b"", None))
        account.dispatcher.request(Request(account.home(0), 1, None, math.inf, 0.0), wait=True)
    assert min(seconds_to_tell() for _ in range(5)) < 10 * few
    for waiter in list(account.dispatcher.line.waiting):
        account.given_up.add(waiter)
        account.dispatcher.abandon(waiter)


def test_giving_up_a_call_that_is_done_does_not_stop_the_one_sent_ahead(account: Account) -> None:
    worker, first, second = two_at_one_worker(account)
    account.given_up.add(first)
    assert account.dispatcher.abandon(first) is None
    assert not worker.leaving
    account.end_call(worker, retiring=False)
    assert second.state == RUNNING
    assert worker.slot.call is second


def test_giving_up_many_that_wait_in_one_lease_costs_as_much_for_each(account: Account) -> None:
    lease = ask_for_lease(account).lease
    assert lease is not None

    def seconds_to_leave(count: int) -> float:
        calls = [Call(account.home(0), print, b"", None) for _ in range(count)]
        for call in calls:
            account.dispatcher.begin_in(lease, call)
        waiting = [call for call in reversed(calls) if call.state == WAITING]
        begun = thread_time()
        for call in waiting:
            account.dispatcher.abandon(call)
        assert not lease.waiting
        return thread_time() - begun

    for _ in range(WORKERS):
        ask_in(account, lease)
    few = min(seconds_to_leave(2_000) for _ in range(3))
    many = min(seconds_to_leave(40_000) for _ in range(3))
    assert many < 60 * few


def test_giving_up_one_sent_ahead_that_has_begun_stops_it(account: Account) -> None:
    worker, first, second = two_at_one_worker(account)
    account.given_up.add(second)
    assert account.dispatcher.abandon(second) is worker
    worker.kill(asyncio.CancelledError)
    account.end_call(worker, retiring=False)
    assert first.state == DONE
    assert first.error is None
    account.tell_of_death(worker)


def test_one_sent_ahead_that_has_begun_has_its_own_time(account: Account) -> None:
    """From when it is found; what its worker had to do before is done."""
    worker, first, second = two_at_one_worker(account)
    second.timeout = 5.0
    now = monotonic()
    worker.deadline = now - 1
    assert not account.dispatcher.look(now).overdue
    assert worker.deadline == now + 5
    assert not account.dispatcher.look(now + 4).overdue
    assert account.dispatcher.look(now + 6).overdue == [(worker, second)]
    worker.kill(lambda: CallTimeoutError("late", timeout=5.0, function="second"))
    account.end_call(worker, retiring=False)
    assert first.error is None
    account.tell_of_death(worker)
    assert isinstance(second.error, CallTimeoutError)


class Interruption(Exception):  # noqa: N818
    """Raised by a signal handler, at any point."""


@pytest.mark.parametrize("step", ["take_back", "rejoin"])
@pytest.mark.parametrize("done", [False, True])
def test_who_is_interrupted_in_taking_a_call_back_loses_it_not(
    account: Account, monkeypatch: pytest.MonkeyPatch, step: str, *, done: bool
) -> None:
    """Just before or just after one step; whoever comes next finds what has been left."""
    blocking, second = ask(account, BLOCKING), ask(account)
    ahead, other = ask(account), ask(account)
    assert second.home is not None
    account.dispatcher.look_ahead(worker_of(second), second.home)
    account.given_up.add(other)
    account.dispatcher.abandon(other)
    assert ahead.ahead is worker_of(second)
    owner: Any = worker_of(second) if step == "take_back" else account.dispatcher.line
    original = getattr(owner, step)

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        if done:
            original(*arguments)
        raise Interruption

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(Interruption):
        account.end_call(worker_of(blocking), retiring=False)
    account.end_call(worker_of(second), retiring=False)
    account.dispatcher.abandon(blocking)
    assert not account.dispatcher.line.ahead
    assert ahead.state in (WAITING, GRANTED, RUNNING)
