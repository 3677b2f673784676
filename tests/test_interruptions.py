"""Signal handlers that raise and finalizers that run at the worst moment lose no worker."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

from tests import jobs
from tests.managers import running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

# --- interruptions --------------------------------------------------------------------------------


class Interruption(Exception):  # noqa: N818
    """Raised by a signal handler, at any point."""


@contextmanager
def interrupted_within(seconds: float) -> Iterator[None]:
    """Raise ``Interruption`` after ``seconds``, unless the block is left before."""
    armed = True

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_caller_interrupted_anywhere_loses_no_worker() -> None:
    """As by a time limit that a signal handler enforces."""
    chance = random.Random(5)
    outcomes = {"interrupted": 0, "answered": 0}
    with running(backend="process") as manager:
        end = time.monotonic() + 30
        while min(outcomes.values()) < 20 and time.monotonic() < end:
            try:
                with interrupted_within(10 ** chance.uniform(-4.5, -1)):
                    manager.run_sync(time.sleep, 0.002)
                outcomes["answered"] += 1
            except Interruption:
                outcomes["interrupted"] += 1
            assert manager.options(timeout=10).run_sync(jobs.add, 1) == 1
        wait_all_idle(manager)
    assert min(outcomes.values()) >= 20, outcomes


@pytest.mark.parametrize("backend", ["process", "thread", "inline"])
@pytest.mark.parametrize("where", ["take_one", "run_blocking"])
def test_a_caller_interrupted_between_two_steps_loses_no_worker(
    backend: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(backend=backend) as manager:
        worker = manager._dispatcher.line.pools[0].slots[0].worker
        owner: Any = manager._dispatcher.line if where == "take_one" else worker
        original = getattr(owner, where)

        def interrupted(*arguments: Any) -> NoReturn:
            if where == "take_one":
                original(*arguments)  # it has been taken, and nobody knows yet
            raise Interruption

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, interrupted)
            with pytest.raises(Interruption):
                manager.run_sync(jobs.add, 1)
        assert manager.options(timeout=20).run_sync(jobs.add, 2) == 2
        wait_all_idle(manager)


def test_a_blocking_caller_whose_wake_up_was_lost_is_woken(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who frees a worker is interrupted before it tells the next."""
    monkeypatch.setattr("leasepool_django.engine.dispatcher.PICKUP_SECONDS", 0.3)
    with running() as manager, ThreadPoolExecutor() as threads:
        holding = threads.submit(manager.run_sync, jobs.hold, stage.folder, "first")
        stage.wait_begun("first")
        waiting = threads.submit(manager.run_sync, jobs.add, 1)
        wait_until(lambda: manager.stats().waiting)
        monkeypatch.setattr(manager._dispatcher, "_wake", lambda wakes: None)
        stage.let_go()
        holding.result(20)
        monkeypatch.undo()
        monkeypatch.setattr("leasepool_django.engine.dispatcher.PICKUP_SECONDS", 0.3)
        assert waiting.result(20) == 1


# --- finalizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["async", "sync"])
def test_the_collector_may_close_a_lease_while_the_account_is_locked(way: str) -> None:
    async def hold() -> None:
        cycle: list[object] = [asyncio.current_task()]
        cycle.append(cycle)
        async with manager.lease(workers=1):
            await asyncio.Event().wait()

    def leave_a_loop_behind() -> None:
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(hold())]
        loop.run_until_complete(async_wait_until(lambda: manager.stats().leases))
        loop.close()
        tasks.clear()

    def held() -> Iterator[None]:
        with manager.lease_sync(workers=1):
            yield

    def leave_a_generator_behind() -> None:
        generator = held()
        next(generator)
        cycle: list[object] = [generator]
        cycle.append(cycle)

    with running(2) as manager:
        gc.disable()
        logging.disable(logging.CRITICAL)  # asyncio's, of a task that was pending
        try:
            (leave_a_loop_behind if way == "async" else leave_a_generator_behind)()
            with manager._dispatcher.lock:
                gc.collect()
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)
        wait_until(lambda: not manager.stats().leases)
        wait_all_idle(manager)
