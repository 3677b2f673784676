"""Executor classes as backends: what the adapter makes of executors that break, refuse or lie."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from concurrent.futures import CancelledError as WithdrawnError
from typing import Any

import pytest

from leasepool_django import (
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    RemoteError,
    WorkerCrashedError,
    WorkerStartError,
)
from leasepool_django.backends.base import Host
from leasepool_django.backends.executor import ThreadBackend
from leasepool_django.engine.line import Slot
from tests import jobs
from tests.conftest import LoopRunner
from tests.managers import new_manager, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import wait_until

POOL = "concurrent.futures.ProcessPoolExecutor"
SPAWN = multiprocessing.get_context("spawn")


class Odd(ThreadPoolExecutor):
    """Does as ``behaviour`` says; set by the tests, and by their functions."""

    behaviour = "normal"
    made = 0

    def __init__(self, max_workers: int) -> None:
        if Odd.behaviour == "cannot be made":
            raise OSError("no room for another executor")
        Odd.made += 1
        super().__init__(max_workers)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        probe = fn is os.getpid
        match Odd.behaviour:
            case "broken" if not probe:
                raise BrokenExecutor("it broke")
            case "shut down" | "cannot be made" if not probe:
                raise RuntimeError("cannot schedule new futures after shutdown")
            case "picky" if not probe:
                raise LookupError("not this one")
            case "withdrawing" if not probe:
                future: Future[Any] = Future()
                future.cancel()
                future.set_running_or_notify_cancel()
                return future
        return super().submit(fn, *args, **kwargs)


@pytest.fixture(autouse=True)
def normal() -> Iterator[None]:
    Odd.made = 0
    yield
    Odd.behaviour = "normal"


def both_ways(manager: LeasedExecutorManager, *call: Any) -> list[BaseException]:
    """The errors that a call ends with for an asynchronous and for a blocking caller."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the test judges it
        asyncio.run(manager.run(*call))
    with pytest.raises(Exception) as raised_blocking:  # noqa: PT011
        manager.run_sync(*call)
    return [raised.value, raised_blocking.value]


# --- executors that break -------------------------------------------------------------------------


def test_a_crash_costs_the_calls_of_the_pool_and_no_later_one(stage: Stage) -> None:
    with ThreadPoolExecutor() as threads, running(4, backend=POOL, mp_context=SPAWN) as manager:
        other = threads.submit(manager.run_sync, jobs.hold, stage.folder, "other")
        stage.wait_begun("other")
        with pytest.raises(WorkerCrashedError, match="costs every call of the pool") as raised:
            manager.run_sync(jobs.die)
        assert raised.value.function == "tests.jobs.die"
        assert isinstance(raised.value.__cause__, BrokenExecutor)
        with pytest.raises(WorkerCrashedError):
            other.result()
        for number in range(8):
            assert manager.options(timeout=20).run_sync(jobs.add, number) == number
        wait_all_idle(manager)
        assert manager.stats().workers_crashed >= 1


def test_a_call_that_meets_a_broken_executor_goes_to_another(loop_runner: LoopRunner) -> None:
    """It has not begun, so it may."""

    async def main() -> None:
        kill(await manager.run(jobs.whoami))
        assert await manager.options(timeout=20).run(jobs.add, 1) == 1

    def kill(who: tuple[int, int]) -> None:
        os.kill(who[0], signal.SIGKILL)
        # Until the executor knows of it, it takes calls and loses them.
        executor = next(iter(manager._backend._executors.values()))  # type: ignore[attr-defined]
        wait_until(lambda: executor._broken)

    with running(backend=POOL, mp_context=SPAWN) as manager:
        loop_runner(main())
        wait_all_idle(manager)
        kill(manager.run_sync(jobs.whoami))
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        wait_all_idle(manager)


def test_a_call_that_meets_broken_executors_only_fails_in_the_end() -> None:
    with running(2, backend=Odd) as manager:
        Odd.behaviour = "broken"
        for error in both_ways(manager, jobs.add, 1):
            assert isinstance(error, WorkerCrashedError)
            assert "it broke" in str(error)
        Odd.behaviour = "normal"
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        wait_all_idle(manager)
        assert manager.stats().calls_started == 1


def test_an_executor_that_was_shut_down_is_replaced() -> None:
    with running(backend=Odd) as manager:
        Odd.behaviour = "shut down"
        for error in both_ways(manager, jobs.add, 1):
            assert isinstance(error, WorkerCrashedError)
        Odd.behaviour = "normal"
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        assert Odd.made >= 2


@pytest.mark.parametrize(
    ("behaviour", "expected"), [("picky", LookupError), ("withdrawing", WithdrawnError)]
)
def test_a_call_that_the_executor_refuses_is_its_callers_error(
    behaviour: str, expected: type[Exception]
) -> None:
    with running(backend=Odd) as manager:
        Odd.behaviour = behaviour
        assert [type(error) for error in both_ways(manager, jobs.add, 1)] == [expected] * 2
        Odd.behaviour = "normal"
        assert manager.run_sync(jobs.add, 1) == 1
        assert (Odd.made, manager.stats().workers_crashed) == (1, 0)


def test_an_executor_that_cannot_be_made_any_more_is_tried_again(stage: Stage) -> None:
    with running(backend=Odd) as manager:
        Odd.behaviour = "cannot be made"
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.add, 1)
        wait_until(lambda: manager.stats().start_failures)
        assert "no room for another executor" in (manager.stats().last_start_error or "")
        Odd.behaviour = "normal"
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1


def test_an_executor_that_cannot_be_made_fails_the_start() -> None:
    Odd.behaviour = "cannot be made"
    manager = new_manager(2, backend=Odd, min_pools=2, max_pools=2)
    for _ in range(2):
        with pytest.raises(WorkerStartError, match="no room for another executor") as raised:
            manager.start_sync()
        assert isinstance(raised.value.__cause__, OSError)
    Odd.behaviour = "normal"
    manager.start_sync()
    assert manager.run_sync(jobs.add, 1) == 1
    manager.stop_sync()


# --- calls that are given up ----------------------------------------------------------------------


def test_a_worker_whose_caller_has_gone_is_taken_until_its_function_ends(stage: Stage) -> None:
    async def main() -> None:
        call = asyncio.create_task(manager.run(jobs.hold, stage.folder, "given up"))
        await stage.wait_begun_async("given up")
        call.cancel()
        await asyncio.wait([call])

    with running(2) as manager:
        asyncio.run(main())
        assert manager.stats().idle_workers == 1
        assert manager.run_sync(jobs.add, 1) == 1
        stage.let_go()
        wait_all_idle(manager)
        assert (manager.stats().workers_killed, manager.stats().workers_started) == (1, 3)


def test_what_is_left_of_a_function_after_the_stop_disturbs_nobody(stage: Stage) -> None:
    """Not even the same manager, started again."""
    with ThreadPoolExecutor() as threads:
        manager = new_manager()
        manager.start_sync()
        call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "left over")
        stage.wait_begun("left over")
        manager.stop_sync(grace=0)
        with pytest.raises(LeasePoolNotStartedError):
            call.result()
        manager.start_sync()
        wait_all_idle(manager)
        stage.let_go()
        for number in range(5):
            assert manager.run_sync(jobs.add, number) == number
        wait_all_idle(manager)
        assert manager.total_count == 1
        manager.stop_sync()


# --- threads --------------------------------------------------------------------------------------


def test_a_thread_runs_a_call_in_a_copy_of_its_callers_context() -> None:
    async def main() -> None:
        jobs.request_id.set("async")
        assert await manager.run(jobs.current_request) == "async"

    with running() as manager:
        asyncio.run(main())
        contextvars.copy_context().run(set_and_check, manager)
        assert manager.run_sync(jobs.current_request) == "none"


def set_and_check(manager: LeasedExecutorManager) -> None:
    jobs.request_id.set("blocking")
    assert manager.run_sync(jobs.current_request) == "blocking"
    with manager.lease_sync() as lease:
        assert lease.executor.submit(jobs.current_request).result() == "blocking"


def test_the_traceback_of_an_exception_leads_into_the_function() -> None:
    with running() as manager:
        for error in both_ways(manager, jobs.fail, "out of stock"):
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            assert names[-1] == "fail"
        for error in both_ways(manager, jobs.raise_stop_iteration):
            assert isinstance(error, RemoteError)
            assert isinstance(error.__cause__, StopIteration)


# --- backends of one's own ------------------------------------------------------------------------


class Unopened(ThreadBackend):
    """Cannot share what its workers need."""

    def open(self, host: Host) -> None:
        raise PermissionError("the door is locked")


def test_a_backend_that_cannot_open_fails_the_start() -> None:
    manager = new_manager(backend=Unopened)
    for _ in range(2):
        with pytest.raises(PermissionError, match="the door is locked"):
            manager.start_sync()
        assert manager.stats().state == "stopped"
    with pytest.raises(LeasePoolNotStartedError, match="could not be started"):
        manager.run_sync(jobs.add, 1)


class Exiting(ThreadBackend):
    """Ends by what is no ordinary error."""

    def start_worker(self, slot: Slot) -> None:
        self.host.start_failed(slot, SystemExit(3))


def test_a_worker_that_exits_while_it_starts_fails_the_start() -> None:
    with pytest.raises(WorkerStartError, match=r"SystemExit\(3\)"):
        new_manager(backend=Exiting).start_sync()
