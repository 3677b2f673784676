"""Signal handlers that raise and finalizers that run at the worst moment lose no worker."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from leasepool_django import (
    ExecutorLease,
    LeasedExecutorManager,
    LeaseUnavailableError,
    WorkerCrashedError,
)
from leasepool_django.backends.process import driver
from leasepool_django.backends.process.driver import ProcessWorker
from leasepool_django.engine import dispatcher, housekeeper
from leasepool_django.engine.ahead import SendingAhead
from leasepool_django.engine.dispatcher import Dispatcher
from tests import jobs, process_jobs
from tests.conftest import HAS_UVLOOP, LoopRunner
from tests.interrupter import Interrupter, Interruption
from tests.managers import noted_warnings, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

# --- interruptions --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "on a loop"])
def test_a_caller_whose_wake_up_was_lost_is_woken(
    blocking: bool,  # noqa: FBT001
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one who frees a worker is interrupted before it tells the next."""

    def wait() -> int:
        return manager.run_sync(jobs.add, 1) if blocking else asyncio.run(manager.run(jobs.add, 1))

    monkeypatch.setattr(dispatcher, "PICKUP_SECONDS", 1.0)
    monkeypatch.setattr(housekeeper, "TICK", 0.05)
    with running() as manager, ThreadPoolExecutor() as threads:
        holding = threads.submit(manager.run_sync, jobs.hold, stage.folder, "first")
        stage.wait_begun("first")
        waiting = threads.submit(wait)
        wait_until(lambda: manager.stats().waiting)
        with monkeypatch.context() as interrupted:
            interrupted.setattr(manager._dispatcher, "_wake", lambda wakes: None)
            stage.let_go()
            holding.result(20)
        assert waiting.result(20) == 1


@pytest.mark.parametrize("ahead", [False, True], ids=["from the line", "sent ahead"])
def test_an_interruption_at_any_step_of_reading_an_outcome_leaves_nobody_waiting(
    ahead: bool,  # noqa: FBT001
    loop_runner: LoopRunner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each line in turn: every caller is told, nothing is run twice, and no worker is lost.

    One loop has the odd lines and the other the even ones, where there are two.
    """
    first = 2 if loop_runner.name == "uvloop" else 1
    each = 2 if HAS_UVLOOP else 1
    monkeypatch.setattr(SendingAhead, "seconds", math.inf if ahead else 0.0)
    if ahead:  # each call whose answer is there at once leaves the others nothing to wait for
        monkeypatch.setattr(driver, "EAGER_CALLS", 0)
    monkeypatch.setattr(housekeeper, "TICK", 0.01)
    caplog.set_level(logging.CRITICAL)

    async def trial(manager: LeasedExecutorManager, step: int) -> str:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        path = tmp_path / f"marks {step}"
        interrupter = Interrupter(ProcessWorker._take_frames, step)
        tasks = [
            asyncio.create_task(manager.run(process_jobs.mark_number, path, number))
            for number in range(4)
        ]
        with interrupter.at_work():
            _, waiting = await asyncio.wait(tasks, timeout=10)
        marks = Counter(path.read_text().split())
        assert not waiting, interrupter.where
        assert set(marks.values()) == {1}, interrupter.where
        for number, task in enumerate(tasks):
            error = task.exception()
            if error is None:
                assert task.result() == number
                assert str(number) in marks
            else:
                assert isinstance(error, WorkerCrashedError | Interruption), interrupter.where
        assert await manager.options(timeout=10).run(abs, -7) == 7, interrupter.where
        assert manager.stats().waiting == 0, interrupter.where
        return interrupter.where

    async def trials(manager: LeasedExecutorManager) -> list[str]:
        await manager.start()
        found: list[str] = []
        while where := await trial(manager, first + each * len(found)):
            found.append(where)
        await manager.stop()
        return found

    with running(backend="process") as manager:
        found = loop_runner(trials(manager))
    assert len(found) > (100 if ahead else 25)
    assert any("ahead.py" in where for where in found) or not ahead, found


@pytest.mark.parametrize("what", ["call", "lease"])
def test_an_interruption_at_any_step_of_picking_up_leaves_nobody_waiting(
    what: str,
    loop_runner: LoopRunner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a thread has freed the worker that a caller on a loop has waited for."""
    monkeypatch.setattr(dispatcher, "PICKUP_SECONDS", 0.1)
    monkeypatch.setattr(housekeeper, "TICK", 0.01)
    caplog.set_level(logging.CRITICAL)

    async def use(manager: LeasedExecutorManager) -> int:
        if what == "call":
            return await manager.run(abs, -7)
        async with manager.lease() as lease:
            return await lease.run(abs, -7)

    async def trial(manager: LeasedExecutorManager, threads: ThreadPoolExecutor, step: int) -> str:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        interrupter = Interrupter(Dispatcher._pick_up, step)
        folder = tmp_path / str(step)
        folder.mkdir()
        before = threads.submit(manager.run_sync, process_jobs.hold, folder)
        await async_wait_until((folder / "holding").exists, timeout=20)
        task = asyncio.create_task(use(manager))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        with interrupter.at_work():
            (folder / "go").touch()
            _, waiting = await asyncio.wait([task], timeout=10)
        assert not waiting, interrupter.where
        error = task.exception()
        told = WorkerCrashedError | LeaseUnavailableError | Interruption
        assert error is None or isinstance(error, told), interrupter.where
        before.result(10)
        assert await manager.options(timeout=10).run(abs, -7) == 7, interrupter.where
        return interrupter.where

    async def trials(manager: LeasedExecutorManager) -> list[str]:
        await manager.start()
        found: list[str] = []
        with ThreadPoolExecutor(1) as threads:
            while where := await trial(manager, threads, len(found) + 1):
                found.append(where)
        await manager.stop()
        return found

    with running(backend="process", call_timeout=30) as manager:
        found = loop_runner(trials(manager))
    assert len(found) > (20 if what == "call" else 4)


# --- finalizers -----------------------------------------------------------------------------------


def test_a_lease_whose_finalizer_was_interrupted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExecutorLease, "__del__", lambda _: None)  # interrupted at its beginning
    monkeypatch.setattr(dispatcher, "PICKUP_SECONDS", 0.1)
    monkeypatch.setattr(housekeeper, "TICK", 0.05)
    with running(2) as manager, noted_warnings() as warned:
        lease = manager.acquire_sync(workers=2, owner="careless")
        assert manager.stats().leases
        del lease
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        assert not manager.stats().leases
        wait_until(lambda: warned)
        assert "(owner 'careless')" in warned[0]


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
