"""A signal handler that raises at any line of the account loses nobody, and no worker.

Here it raises at each line in turn below one step, with stand-ins for workers; what its caller does
then, the engine's own callers do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from leasepool_django.engine.dispatcher import Dispatcher
from leasepool_django.engine.lease import LeaseState
from leasepool_django.engine.line import RUNNING, WAITING, Call, Request, Waiter
from leasepool_django.exceptions import LeaseTimeoutError
from tests.account import WORKERS, Account, StandIn
from tests.interrupter import Interrupter, Interruption

BLOCKING = 2  # the caller that is no event loop's


@dataclass
class Scene:
    """A moment: who does what next, and may be interrupted."""

    account: Account
    step: Callable[[], object]
    waiter: Waiter | None = None  # whose thread it is
    leases: list[LeaseState] = field(default_factory=list)  # which are given back later

    def react(self) -> None:
        """What a blocking caller does whatever is raised, and others do later."""
        dispatcher = self.account.dispatcher
        if self.waiter is not None:
            self.account.given_up.add(self.waiter)
            worker = dispatcher.abandon(self.waiter)
            if worker is not None:
                worker.kill(asyncio.CancelledError)
        for lease in self.leases:
            dispatcher.release(lease)


def new_call(account: Account, caller: int = BLOCKING, lease: LeaseState | None = None) -> Call:
    call = Call(account.home(caller), print, b"", None)
    account.arrive(call, lease)
    return call


def asked(account: Account, workers: int = WORKERS, caller: int = BLOCKING) -> Request:
    account.acquire(caller, workers)
    request = account.came[None][-1]
    assert isinstance(request, Request)
    return request


def granted(account: Account, workers: int = WORKERS) -> LeaseState:
    lease = asked(account, workers).lease
    assert lease is not None
    return lease


def all_busy(account: Account) -> list[Call]:
    account.dispatcher.max_pools = 1
    for _ in range(WORKERS):
        account.call(BLOCKING)
    return [call for call in account.came[None] if isinstance(call, Call)]


def others_wait(account: Account) -> None:
    account.call(0)
    asked(account, 1, caller=1)
    account.call(BLOCKING)


def begin(account: Account) -> Scene:
    call = new_call(account)
    return Scene(account, lambda: account.run_on(account.dispatcher.begin(call), call), call)


def begin_in_line(account: Account) -> Scene:
    all_busy(account)
    return begin(account)


def begin_in_lease(account: Account) -> Scene:
    lease = granted(account)
    return begin_in(account, lease)


def begin_in(account: Account, lease: LeaseState) -> Scene:
    call = new_call(account, lease=lease)

    def step() -> None:
        account.run_on(account.dispatcher.begin_in(lease, call), call)

    return Scene(account, step, call)


def begin_in_lease_in_line(account: Account) -> Scene:
    lease = granted(account)
    for _ in range(WORKERS):
        call = new_call(account, lease=lease)
        account.run_on(account.dispatcher.begin_in(lease, call), call)
    return begin_in(account, lease)


def request(account: Account) -> Scene:
    request = Request(None, WORKERS, None, math.inf, 0.0)
    account.arrive(request, None)
    return Scene(account, partial(account.dispatcher.request, request, wait=True), request)


def request_in_line(account: Account) -> Scene:
    all_busy(account)
    others_wait(account)
    return request(account)


def call_ends(account: Account) -> Scene:
    call = all_busy(account)[0]
    others_wait(account)
    assert isinstance(call.worker, StandIn)
    return Scene(account, partial(account.end_call, call.worker, retiring=False), call)


def call_ends_before_a_lease(account: Account) -> Scene:
    call = all_busy(account)[0]
    asked(account, 1, caller=0)
    account.call(1)
    assert isinstance(call.worker, StandIn)
    return Scene(account, partial(account.end_call, call.worker, retiring=False), call)


def call_in_lease_ends(account: Account) -> Scene:
    lease = granted(account)
    calls = [new_call(account, BLOCKING if number else 0, lease) for number in range(WORKERS + 2)]
    for call in calls:
        account.run_on(account.dispatcher.begin_in(lease, call), call)
    worker = calls[1].worker
    assert isinstance(worker, StandIn)
    return Scene(account, partial(account.end_call, worker, retiring=False), calls[1])


def release(account: Account) -> Scene:
    account.dispatcher.max_pools = 1
    lease = granted(account)
    for caller in (0, 1, BLOCKING, 0):
        call = new_call(account, caller, lease)
        account.run_on(account.dispatcher.begin_in(lease, call), call)
    others_wait(account)
    return Scene(account, partial(account.dispatcher.release, lease), leases=[lease])


def release_unused(account: Account) -> Scene:
    account.dispatcher.max_pools = 1
    lease = granted(account)
    others_wait(account)
    return Scene(account, partial(account.dispatcher.release, lease), leases=[lease])


def time_out(account: Account) -> Scene:
    all_busy(account)
    account.call(BLOCKING)
    waiter = account.came[None][-1]
    others_wait(account)

    def leave() -> None:
        account.dispatcher.leave(waiter, lambda: LeaseTimeoutError("late"))

    return Scene(account, leave, waiter)


def time_out_on_a_loop(account: Account) -> Scene:
    """In its timer: it must be told all the same."""
    all_busy(account)
    others_wait(account)
    account.call(0)
    waiter = account.came[None][-1]

    def leave() -> None:
        account.dispatcher.leave(waiter, lambda: LeaseTimeoutError("late"))

    return Scene(account, leave)


def take_up(account: Account) -> Scene:
    first = all_busy(account)[0]
    account.call(BLOCKING)
    waiter = account.came[None][-1]
    assert isinstance(first.worker, StandIn)
    account.end_call(first.worker, retiring=False)

    def step() -> None:
        assert isinstance(waiter, Call)
        account.run_on(waiter.worker if account.dispatcher.take_up(waiter) else None, waiter)

    return Scene(account, step, waiter)


def give_up(account: Account, waiter: Waiter) -> Scene:
    """As where it is cancelled; if that is interrupted, the housekeeper does it once more."""
    account.given_up.add(waiter)

    def step() -> None:
        worker = account.dispatcher.abandon(waiter)
        if worker is not None:
            worker.kill(asyncio.CancelledError)

    return Scene(account, step, waiter)


def give_up_waiting(account: Account) -> Scene:
    scene = time_out(account)
    assert scene.waiter is not None
    return give_up(account, scene.waiter)


def give_up_waiting_for_a_lease(account: Account) -> Scene:
    all_busy(account)
    waiter = asked(account, 1, caller=1)
    others_wait(account)
    return give_up(account, waiter)


def give_up_what_was_granted(account: Account) -> Scene:
    scene = take_up(account)
    others_wait(account)
    assert scene.waiter is not None
    return give_up(account, scene.waiter)


def give_up_a_lease(account: Account) -> Scene:
    account.dispatcher.max_pools = 1
    waiter = asked(account)
    others_wait(account)
    return give_up(account, waiter)


def give_up_running(account: Account) -> Scene:
    call = all_busy(account)[0]
    others_wait(account)
    return give_up(account, call)


SCENES: dict[Callable[[Account], Scene], str] = {
    begin: "begin",
    begin_in_line: "begin",
    begin_in_lease: "begin_in",
    begin_in_lease_in_line: "begin_in",
    request: "request",
    request_in_line: "request",
    call_ends: "call_ended",
    call_ends_before_a_lease: "call_ended",
    call_in_lease_ends: "call_ended",
    release: "release",
    release_unused: "release",
    time_out: "leave",
    time_out_on_a_loop: "leave",
    take_up: "take_up",
    give_up_waiting: "abandon",
    give_up_waiting_for_a_lease: "abandon",
    give_up_what_was_granted: "abandon",
    give_up_a_lease: "abandon",
    give_up_running: "abandon",
}


@pytest.mark.parametrize("others_come_first", [False, True])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_an_interruption_at_any_line_loses_nobody_and_no_worker(
    scene: Callable[[Account], Scene],
    others_come_first: bool,  # noqa: FBT001
) -> None:
    """``others_come_first``: another call ends before the housekeeper looks after the account."""
    steps = 0
    while interrupted_at(steps + 1, scene, others_come_first=others_come_first):
        steps += 1
    assert steps > 3


def interrupted_at(step: int, scene: Callable[[Account], Scene], *, others_come_first: bool) -> str:
    """Interrupt at this line; give where that was, or nothing if there is none any more."""
    account = Account()
    account.open()
    try:
        now = scene(account)
        interrupter = Interrupter(getattr(Dispatcher, SCENES[scene]), step)
        with interrupter.at_work():
            try:
                now.step()
            except Interruption:
                assert interrupter.where
        if interrupter.where:
            account.interrupted = True
            now.react()
        if others_come_first:
            for worker in [one for one in account.busy() if not one.dead][:1]:
                account.end_call(worker, retiring=False)
        account.settle()
        line = account.dispatcher.line
        assert (line.requests, line.requested) == (0, 0)
        assert not [one for one in account.those(WAITING, RUNNING) if isinstance(one, Call)]
    except BaseException as error:
        error.add_note(f"interrupted at step {step}, {interrupter.where}")
        raise
    finally:
        for loop in account.loops:
            loop.close()
    return interrupter.where
