"""An event loop that has many outcomes to read turns to its other work in between."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.process import turns
from leasepool_django.backends.process.driver import ProcessWorker
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import assert_full_capacity, running, workers_of
from tests.process_table import fork_servers, state
from tests.waiting import async_wait_until, wait_until

Step = Callable[[], None]


class Clock:
    """One that stands still, so that all that is read is read in the same moment."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "monotonic", clock)
    return clock


def readable(worker: ProcessWorker) -> bool:
    poller = select.poll()
    poller.register(worker.channel, select.POLLIN)
    return bool(poller.poll(0))


def nothing() -> None:
    pass


async def woken_in(
    manager: LeasedExecutorManager, count: int, meanwhile: Step = nothing
) -> list[int]:
    """In which turns of the loop so many callers, whose outcomes lie there at once, go on."""
    loop = asyncio.get_running_loop()
    turn = 0
    found: list[int] = []

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        if len(found) < count:
            loop.call_soon(next_turn)

    async def call() -> None:
        await manager.run(time.sleep, 0.02)
        found.append(turn)

    async with asyncio.timeout(20):
        callers = [asyncio.create_task(call()) for _ in range(count)]
        await asyncio.sleep(0)  # each makes its call
        # From here on the loop is blocked, until all have answered.
        wait_until(lambda: all(readable(worker) for worker in workers_of(manager)))
        meanwhile()
        next_turn()
        await asyncio.gather(*callers)
    return found


def test_outcomes_of_several_workers_are_read_in_as_many_turns(
    loop_runner: LoopRunner, clock: Clock
) -> None:
    with running(4) as manager:
        found = loop_runner(woken_in(manager, 4))
    assert len(set(found)) == 4


def test_of_many_workers_some_are_read_in_the_same_turn(
    loop_runner: LoopRunner, clock: Clock
) -> None:
    with running(8) as manager:
        found = loop_runner(woken_in(manager, 8))
    assert 3 <= len(set(found)) < 8


def test_workers_of_several_managers_take_turns(loop_runner: LoopRunner, clock: Clock) -> None:
    async def both() -> list[int]:
        async def of_other() -> list[int]:
            return await woken_in(other, 2)

        task = asyncio.create_task(of_other())
        await asyncio.sleep(0)
        return [*await woken_in(manager, 2), *await task]

    with running(2) as manager, running(2) as other:
        found = loop_runner(both())
    assert len(found) == 4


def test_workers_that_died_after_their_answers_have_answered(
    loop_runner: LoopRunner, clock: Clock, tmp_path: Path
) -> None:
    def kill_all() -> None:
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: all(worker.is_dead for worker in workers))

    with running(4) as manager:
        workers = workers_of(manager)
        loop_runner(woken_in(manager, 4, kill_all))
        assert_full_capacity(manager, tmp_path)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_had_not_read_its_call_is_noticed_though_nobody_reports_it(
    victim: int, loop_runner: LoopRunner, clock: Clock
) -> None:
    """uvloop tells only once of a connection that was reset."""

    async def calls() -> None:
        # Both workers are watched by the loop, and know the function.
        await asyncio.gather(manager.run(time.sleep, 0.05), manager.run(time.sleep, 0.05))
        dies, lives = workers[victim], workers[1 - victim]
        assert dies.pid is not None
        assert lives.pid is not None
        os.kill(dies.pid, signal.SIGSTOP)
        # Before, it might receive the call, and nobody could tell that it has not seen it.
        wait_until(lambda: state(dies.pid or 0) == "T")
        with stopped(server):
            with stopped(lives.pid):
                both = [asyncio.create_task(manager.run(jobs.echo, n)) for n in range(2)]
                await asyncio.sleep(0)
            wait_until(lambda: readable(lives))
            os.kill(dies.pid, signal.SIGKILL)
            wait_until(lambda: readable(dies))
            async with asyncio.timeout(5):
                assert await asyncio.gather(*both) == [0, 1]

    with running(2) as manager:
        workers = workers_of(manager)
        (server,) = fork_servers(os.getpid())
        loop_runner(calls())


def test_a_loop_that_is_closed_with_outcomes_unread_can_be_forgotten(
    loop_runner: LoopRunner, clock: Clock
) -> None:
    async def leave_all_but_one(manager: LeasedExecutorManager) -> None:
        callers = [asyncio.create_task(manager.run(time.sleep, 0.02)) for _ in range(8)]
        await asyncio.sleep(0)
        wait_until(lambda: all(readable(worker) for worker in workers_of(manager)))
        await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)

    def left() -> list[weakref.ref[Any]]:
        with running(8) as manager:
            workers = [weakref.ref(worker) for worker in workers_of(manager)]
            loop = loop_runner.new_event_loop()
            loop.run_until_complete(leave_all_but_one(manager))
            for task in asyncio.all_tasks(loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()
        return [weakref.ref(loop), *workers]

    known = left()

    def gone() -> bool:
        gc.collect()
        return not any(one() for one in known)

    wait_until(gone)


def test_a_worker_keeps_no_loops_that_were_closed_before_its_last_one(
    loop_runner: LoopRunner,
) -> None:
    def used() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = loop_runner.new_event_loop()
        loop.run_until_complete(manager.run(jobs.echo, 1))
        loop.close()
        return weakref.ref(loop)

    def left() -> int:
        gc.collect()
        return sum(one() is not None for one in loops)

    with running(1) as manager:
        loops = [used() for _ in range(5)]
        wait_until(lambda: left() <= 1)


def test_each_caller_gets_its_own_answer(loop_runner: LoopRunner, clock: Clock) -> None:
    async def calls() -> list[Any]:
        return await asyncio.gather(*(manager.run(jobs.echo, number) for number in range(3_000)))

    with running(5) as manager:
        assert loop_runner(calls()) == [*range(3_000)]
        assert sum(worker.calls for worker in workers_of(manager)) == 3_000


class StandIn:
    """A worker, as far as turns are concerned."""

    has_call = True
    read = 0

    def runs_for(self, home: asyncio.AbstractEventLoop) -> bool:
        return self.has_call

    def read_from(self, home: asyncio.AbstractEventLoop) -> None:
        self.read += 1


def test_the_one_that_has_waited_longest_is_the_first(
    loop_runner: LoopRunner, clock: Clock
) -> None:
    async def turn_by_turn() -> None:
        order = turns.Turns.of(asyncio.get_running_loop())
        a, b, c, d = workers

        def choices(*asked: Any) -> list[Any]:
            return [order.choose(worker) for worker in asked]

        assert choices(a) == [a]
        order.over()
        assert choices(b, c, d) == [None] * 3
        clock.now += 1
        # A selector tells of those who wait again and again, and may always begin with the same.
        assert choices(d) == [b]
        order.over()
        assert choices(c, d, b) == [None] * 3
        clock.now += 1
        c.has_call = False  # its outcome was read otherwise
        assert choices(b) == [d]
        clock.now += 1
        assert choices(a) == [b]
        clock.now += 1
        assert choices(a) == [a]
        assert choices(a) == [a]

    workers = [StandIn() for _ in range(4)]
    loop_runner(turn_by_turn())


def test_who_is_not_called_again_is_read_from_a_little_later(
    loop_runner: LoopRunner, clock: Clock
) -> None:
    async def calls() -> None:
        order = turns.Turns.of(asyncio.get_running_loop())
        other = StandIn()
        first: Any = StandIn()
        second: Any = other
        for count in 1, 2:  # and again
            assert order.choose(first) is first
            order.over()
            assert order.choose(second) is None
            await async_wait_until(lambda: other.read)
            assert other.read == 1
            other.read = 0
            clock.now += count

    loop_runner(calls())


def test_there_is_one_for_each_loop(loop_runner: LoopRunner) -> None:
    async def one() -> turns.Turns:
        loop = asyncio.get_running_loop()
        found = turns.Turns.of(loop)
        assert turns.Turns.of(loop) is found
        return found

    assert loop_runner(one()) is not loop_runner(one())
