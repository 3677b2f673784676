"""A function that has ended is not stopped because its event loop was busy with something else."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.process import tray
from leasepool_django.engine import dispatcher as dispatcher_module
from leasepool_django.engine import housekeeper as housekeeper_module
from leasepool_django.engine.ahead import SendingAhead
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import running, workers_of
from tests.waiting import async_wait_until, wait_until

LIMIT = 0.5  # seconds a call may run


def begun(manager: LeasedExecutorManager, *call: Any) -> asyncio.Task[Any]:
    async def one() -> Any:
        return await manager.run(*call)

    return asyncio.ensure_future(one())


def block(manager: LeasedExecutorManager, go: Path, seconds: float = 0.0) -> None:
    """Block this thread until calls that wait for ``go`` have answered, and for some time."""
    assert not any(worker.has_answered() for worker in workers_of(manager))
    go.touch()
    wait_until(lambda: all(worker.has_answered() for worker in workers_of(manager)))
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ((jobs.echo, 1), 1),
        ((bytes, 50_000), bytes(50_000)),
        ((bytes, 5_000_000), bytes(5_000_000)),
        ((jobs.log, "one", "two"), None),
    ],
    ids=["small", "medium", "large", "logged"],
)
@pytest.mark.parametrize("max_shared_bytes", [None, 0])
def test_a_time_limit_that_is_over_since(
    call: tuple[Any, ...],
    answer: object,
    max_shared_bytes: int | None,
    loop_runner: LoopRunner,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"

    async def calls() -> Any:
        task = begun(manager, jobs.after, go, *call)
        await asyncio.sleep(0)
        block(manager, go, 2 * LIMIT)
        return await task

    options = {} if max_shared_bytes is None else {"max_shared_bytes": max_shared_bytes}
    with (
        caplog.at_level(logging.INFO, "tests.worker"),
        running(forward_process_logs=True, call_timeout=LIMIT, **options) as manager,
    ):
        pid = manager.run_sync(os.getpid)
        got = loop_runner(calls())
        assert got == (pid if answer is None else answer)
        assert manager.run_sync(os.getpid) == pid
        assert manager.stats().workers_killed == 0


def test_what_is_left_to_do_once_its_loop_goes_on(
    loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A large result has to be put where the loop says; that takes its time on a busy machine."""
    monkeypatch.setattr(housekeeper_module, "TICK", 0.02)
    go = tmp_path / "go"
    limit = 2.0

    async def calls() -> Any:
        task = begun(manager, jobs.after, go, bytes, 5_000_000)
        await asyncio.sleep(0)
        block(manager, go, limit)
        (worker,) = workers_of(manager)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        await async_wait_until(lambda: not worker.has_answered())
        await asyncio.wait([task], timeout=0.1)  # as long as some ticks
        os.kill(worker.pid, signal.SIGCONT)
        return await task

    with running(call_timeout=limit) as manager:
        assert loop_runner(calls()) == bytes(5_000_000)
        assert manager.stats().workers_killed == 0


def test_a_cancel_that_comes_too_late(loop_runner: LoopRunner, tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def calls() -> None:
        tasks = [begun(manager, jobs.after, go, jobs.echo, number) for number in range(2)]
        await asyncio.sleep(0)
        block(manager, go)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert await manager.run(jobs.echo, 3) == 3

    with running(2) as manager:
        loop_runner(calls())
        wait_until(lambda: manager.stats().idle_workers == 2)
        assert manager.stats().workers_killed == 0


@pytest.mark.skipif(not tray.SUPPORTED, reason="nothing is sent ahead here")
def test_a_cancel_that_comes_too_late_costs_nobody_who_was_sent_ahead(
    loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whose call the worker has begun, which nobody has been told yet."""
    monkeypatch.setattr(SendingAhead, "seconds", math.inf)
    monkeypatch.setattr(housekeeper_module, "TICK", 0.02)
    go, end = tmp_path / "go", tmp_path / "end"

    async def calls() -> None:
        tasks = [begun(manager, jobs.echo, 0)]
        tasks.append(begun(manager, jobs.after, go, jobs.echo, 1))
        tasks.append(begun(manager, jobs.after, end, jobs.echo, 2))
        tasks.append(begun(manager, jobs.echo, 3))
        await tasks[0]
        (worker,) = workers_of(manager)
        assert worker.ahead is not None
        block(manager, go)
        tasks[1].cancel()
        asyncio.get_running_loop().call_soon(time.sleep, 0.5)  # as long as many ticks
        await asyncio.sleep(0)
        end.touch()
        assert await asyncio.gather(*tasks[2:]) == [2, 3]

    with running() as manager:
        loop_runner(calls())
        assert manager.stats().workers_killed == 0


def test_a_cancel_stops_what_runs_beside_it(loop_runner: LoopRunner) -> None:
    async def calls() -> None:
        task = begun(manager, time.sleep, 60)
        await asyncio.sleep(0)
        assert not any(worker.has_answered() for worker in workers_of(manager))
        task.cancel()
        await asyncio.wait([task])

    with running() as manager:
        loop_runner(calls())
        wait_until(lambda: manager.stats().workers_killed == 1)


@pytest.mark.parametrize("end", ["time limit", "cancel"])
def test_a_loop_that_does_not_go_on_costs_its_worker(
    end: str, loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Others need the place."""
    go = tmp_path / "go"
    monkeypatch.setattr(dispatcher_module, "PICKUP_SECONDS", 0.1)
    monkeypatch.setattr(housekeeper_module, "TICK", 0.05)

    def other() -> Any:
        return manager.options(timeout=20).run_sync(jobs.echo, 2)

    async def calls(ask: Callable[[], Any]) -> Any:
        task = begun(manager, jobs.after, go, jobs.echo, 1)
        await asyncio.sleep(0)
        block(manager, go)
        if end == "cancel":
            task.cancel()
            await asyncio.sleep(0)
        ask()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    with running(call_timeout=LIMIT) as manager, ThreadPoolExecutor() as threads:
        got = loop_runner(calls(lambda: threads.submit(other).result()))
        if end == "cancel":
            assert isinstance(got, asyncio.CancelledError)
        else:
            assert got == 1
        wait_until(lambda: manager.stats().idle_workers == 1)
        # uvloop may have read the outcome before it told the task that it was cancelled.
        assert manager.stats().workers_killed == 1 or end == "cancel"
