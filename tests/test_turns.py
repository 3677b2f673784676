"""An event loop that has many outcomes to read turns to its other work in between."""

from __future__ import annotations

import asyncio
import math
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.process import turns
from leasepool_django.backends.process.driver import ProcessWorker
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import assert_full_capacity, running
from tests.waiting import wait_until

Step = Callable[[], None]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long after the last outcome, it counts as the same turn."""
    monkeypatch.setattr(turns, "APART_SECONDS", math.inf)


def workers_of(manager: LeasedExecutorManager) -> list[ProcessWorker]:
    found: list[ProcessWorker] = []
    for pool in manager._supervisor.dispatcher.line.pools:
        for slot in pool.slots:
            assert isinstance(slot.worker, ProcessWorker)
            found.append(slot.worker)
    return found


def readable(worker: ProcessWorker) -> bool:
    poller = select.poll()
    poller.register(worker.channel, select.POLLIN)
    return bool(poller.poll(0))


async def woken_in(manager: LeasedExecutorManager, count: int, meanwhile: Step) -> list[int]:
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


def nothing() -> None:
    pass


def test_outcomes_of_several_workers_are_read_in_as_many_turns(
    loop_runner: LoopRunner, apart: None
) -> None:
    with running(4) as manager:
        found = loop_runner(woken_in(manager, 4, nothing))
    assert len(set(found)) == 4


def test_of_many_workers_some_are_read_in_the_same_turn(
    loop_runner: LoopRunner, apart: None
) -> None:
    with running(8) as manager:
        found = loop_runner(woken_in(manager, 8, nothing))
    assert 3 <= len(set(found)) < 8


def test_a_worker_that_died_while_it_had_to_wait_has_answered(
    loop_runner: LoopRunner, apart: None, tmp_path: Path
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


def test_each_caller_gets_its_own_answer(loop_runner: LoopRunner, apart: None) -> None:
    async def calls() -> list[Any]:
        return await asyncio.gather(*(manager.run(jobs.echo, number) for number in range(3_000)))

    with running(5) as manager:
        assert loop_runner(calls()) == [*range(3_000)]
        assert sum(worker.calls for worker in workers_of(manager)) == 3_000


def test_the_one_that_has_waited_longest_is_the_first(apart: None) -> None:
    order = turns.Turns()
    a, b, c, d = (object.__new__(ProcessWorker) for _ in range(4))
    assert [order.next(worker) for worker in (a, b, c)] == [None] * 3
    assert order.next(d) is a
    order.over()
    # A selector tells of those that wait again and again, and may always name the same one first.
    assert [order.next(worker) for worker in (d, c, b)] == [None] * 3
    assert order.next(d) is b
    order.forget(c)
    assert [order.next(worker) for worker in (b, d, b)] == [None] * 3
    assert order.next(b) is d
