"""A call on its way to a worker: sent bit by bit, held up, given up, or sent to another one."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import CallTimeoutError, LeasedExecutorManager
from leasepool_django.backends.process import outbox
from leasepool_django.backends.process.outbox import Outbox
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import CALLERS, Caller, assert_full_capacity, running
from tests.process_table import state
from tests.waiting import async_wait_until, wait_until

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)

# Far more than a socket takes at once. Over it, or through shared memory with a note on it.
LARGE = bytes(range(256)) * (1 << 15)
WAYS = {"socket": 0, "memory": 1 << 28}
each_way = pytest.mark.parametrize("cap", WAYS.values(), ids=WAYS.keys())


@contextmanager
def stopped_worker(manager: LeasedExecutorManager) -> Iterator[int]:
    """Stop the only worker, so that it reads nothing."""
    pid = manager.run_sync(os.getpid)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T")
    yield pid


@each_caller
@each_way
def test_a_large_call_and_a_large_result_arrive_whole(caller: Caller, cap: int) -> None:
    with running(2, max_shared_bytes=cap) as manager:
        outcomes = caller.outcomes(manager, [(jobs.echo, LARGE)] * 4)
    assert [outcome == LARGE for outcome in outcomes] == [True] * 4


@each_way
def test_a_worker_that_reads_late_gets_the_rest_then(cap: int, loop_runner: LoopRunner) -> None:
    """Meanwhile the loop runs on, and other calls with it."""

    async def calls() -> None:
        task = asyncio.create_task(manager.run(jobs.echo, LARGE))
        await async_wait_until(lambda: manager.stats().busy_workers == 1)
        assert await manager.run(jobs.echo, "meanwhile") == "meanwhile"
        assert not task.done()
        os.kill(pid, signal.SIGCONT)
        assert await task == LARGE

    with running(2, max_shared_bytes=cap) as manager:
        # What is idle longest is taken last: the next call goes to the stopped worker.
        with stopped_worker(manager) as pid:
            loop_runner(calls())
        assert manager.stats().workers_crashed == 0


@each_way
def test_a_call_can_be_cancelled_while_it_is_on_its_way(
    cap: int, loop_runner: LoopRunner, tmp_path: Path
) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(manager.run(jobs.echo, LARGE))
        await async_wait_until(lambda: manager.stats().busy_workers == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await manager.run(jobs.echo, LARGE) == LARGE

    with running(max_shared_bytes=cap) as manager:
        with stopped_worker(manager):
            loop_runner(cancel())
        assert manager.stats().workers_killed == 1
        assert_full_capacity(manager, tmp_path)


@each_caller
@each_way
def test_a_call_times_out_while_it_is_on_its_way(caller: Caller, cap: int, tmp_path: Path) -> None:
    with running(max_shared_bytes=cap, call_timeout=0.3) as manager:
        with stopped_worker(manager):
            error = caller.outcome(manager, jobs.echo, LARGE)
        assert type(error) is CallTimeoutError
        assert str(error).startswith("tests.process_jobs.echo ran longer than its call_timeout")
        assert_full_capacity(manager, tmp_path)


@each_way
@pytest.mark.parametrize("size", [10, len(LARGE)], ids=["small", "large"])
@each_caller
def test_a_call_that_was_on_its_way_to_a_worker_that_dies_goes_to_another_one(
    caller: Caller, size: int, cap: int, tmp_path: Path
) -> None:
    """It cannot have begun, so it is not a call run twice."""
    mark = tmp_path / "mark"
    with running(max_shared_bytes=cap) as manager, ThreadPoolExecutor(1) as thread:
        with stopped_worker(manager) as pid:
            answer: Future[Any] = thread.submit(
                caller, manager, jobs.mark_and_measure, mark, LARGE[:size]
            )
            wait_until(lambda: manager.stats().busy_workers == 1)
            os.kill(pid, signal.SIGKILL)
            assert answer.result(20) == size
        assert len(mark.read_text().splitlines()) == 1
        assert str(pid) not in mark.read_text()
        assert_full_capacity(manager, tmp_path)


def test_an_idle_worker_that_speaks_unasked_is_replaced(
    loop_runner: LoopRunner, tmp_path: Path
) -> None:
    """A thread that a function had left behind writes into the socket; it costs no call."""
    go = tmp_path / "go"

    async def calls() -> None:
        before = await manager.run(jobs.interfere_later, go)
        go.touch()
        await async_wait_until(lambda: manager.stats().workers_crashed == 1)
        assert await manager.run(os.getpid) != before

    with running() as manager:
        loop_runner(calls())
        assert_full_capacity(manager, tmp_path)


# --- written bit by bit ---------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Let a loop write a call bit by bit, and do something before a certain bit."""
    write_on = Outbox.write_on
    todo: dict[int, Callable[[], Any]] = {}
    steps = itertools.count(1)

    def spy(one: Outbox) -> bool:
        todo.pop(next(steps), int)()
        return write_on(one)

    monkeypatch.setattr(outbox, "STEP", len(LARGE) // 20)
    monkeypatch.setattr(Outbox, "write_on", spy)
    yield todo.__setitem__
    assert not todo


def test_a_loop_runs_on_while_a_large_call_is_written(
    loop_runner: LoopRunner, at_step: Callable[[int, Callable[[], Any]], None]
) -> None:
    """And what arrives is whole, wherever its parts begin and end."""

    async def calls() -> None:
        task = asyncio.create_task(manager.run(jobs.echo, [LARGE, bytearray(LARGE), LARGE[:99]]))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert await task == [LARGE, LARGE, LARGE[:99]]
        assert turns >= 40

    at_step(40, int)
    with running() as manager:
        loop_runner(calls())


def test_a_call_to_a_worker_that_dies_while_it_is_written_goes_to_another(
    loop_runner: LoopRunner, at_step: Callable[[int, Callable[[], Any]], None], tmp_path: Path
) -> None:
    async def call() -> None:
        assert await manager.run(jobs.mark_and_measure, tmp_path / "mark", LARGE) == len(LARGE)

    with running() as manager:
        pid = manager.run_sync(os.getpid)
        at_step(10, lambda: os.kill(pid, signal.SIGKILL))
        # The loop hears of it while it still writes.
        at_step(11, lambda: wait_until(lambda: state(pid) in {"Z", ""}))
        loop_runner(call())
        assert len((tmp_path / "mark").read_text().splitlines()) == 1
        assert manager.run_sync(os.getpid) != pid
        assert_full_capacity(manager, tmp_path)


def test_a_call_can_be_cancelled_while_it_is_written(
    loop_runner: LoopRunner, at_step: Callable[[int, Callable[[], Any]], None], tmp_path: Path
) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(manager.run(jobs.echo, LARGE))
        at_step(10, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await manager.run(jobs.echo, LARGE[::-1]) == LARGE[::-1]

    with running() as manager:
        loop_runner(cancel())
        assert manager.stats().workers_killed == 1
        assert_full_capacity(manager, tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError()], ids=repr)
def test_a_call_that_cannot_be_written_to_its_end_goes_by_socket_or_fails(
    loop_runner: LoopRunner,
    at_step: Callable[[int, Callable[[], Any]], None],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: object) -> None:
        monkeypatch.undo()
        raise error

    async def call() -> Any:
        return await manager.run(jobs.echo, LARGE)

    with running() as manager:
        at_step(10, lambda: monkeypatch.setattr(os, "posix_fallocate", fail))
        if isinstance(error, OSError):
            assert loop_runner(call()) == LARGE
        else:
            with pytest.raises(MemoryError):
                loop_runner(call())
        assert_full_capacity(manager, tmp_path)
