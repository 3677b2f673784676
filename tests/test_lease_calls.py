"""The calls of one lease: their own line, and the executor that other libraries are given."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from leasepool_django import (
    CallTimeoutError,
    ExecutorLease,
    LeaseExpiredError,
    LeaseReleasedError,
)
from tests import jobs
from tests.managers import noted_warnings, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


def test_calls_that_leave_the_leases_line_are_not_begun(stage: Stage) -> None:
    async def main() -> None:
        async with manager.lease() as lease:
            first = asyncio.create_task(lease.run(jobs.hold, stage.folder, "first"))
            await stage.wait_begun_async("first")
            second = asyncio.create_task(lease.run(jobs.begin, stage.folder, "second"))
            third = asyncio.create_task(lease.run(jobs.begin, stage.folder, "third"))
            await async_wait_until(lambda: manager.stats().leases[0].waiting == 2)
            second.cancel()
            await asyncio.wait([second])
            assert manager.stats().leases[0].waiting == 1
            stage.let_go()
            await asyncio.gather(first, third)
        assert stage.begun() == ["first", "third"]

    with running() as manager:
        asyncio.run(main())


def test_blocking_and_awaiting_callers_share_the_leases_line(stage: Stage) -> None:
    async def main() -> None:
        async with manager.lease() as lease:
            calls: list[asyncio.Future[str]] = []
            for number, name in enumerate(["await 1", "block 1", "await 2", "block 2"]):
                if name.startswith("await"):
                    call = lease.run(jobs.hold, stage.folder, name)
                else:
                    call = asyncio.to_thread(lease.run_sync, jobs.hold, stage.folder, name)
                calls.append(asyncio.ensure_future(call))
                await async_wait_until(
                    lambda number=number: manager.stats().leases[0].waiting == number  # type: ignore[misc]
                )
                await stage.wait_begun_async("await 1")
            stage.let_go()
            await asyncio.gather(*calls)
        assert stage.begun() == ["await 1", "block 1", "await 2", "block 2"]

    with running() as manager:
        asyncio.run(main())


def test_the_executor_has_no_more_threads_than_the_lease_has_workers(stage: Stage) -> None:
    with running(3) as manager, manager.lease_sync(workers=2) as lease:
        before = threading.active_count()
        assert lease.executor is lease.executor
        assert threading.active_count() == before
        futures = [lease.executor.submit(jobs.add, number) for number in range(20)]
        assert threading.active_count() <= before + 2
        assert [future.result() for future in futures] == list(range(20))


def test_the_executors_threads_end_with_the_lease() -> None:
    with running() as manager:
        before = set(threading.enumerate())
        with manager.lease_sync() as lease:
            assert lease.executor.submit(jobs.add, 1).result() == 1
            assert set(threading.enumerate()) > before
        wait_until(lambda: set(threading.enumerate()) <= before)


def test_the_executor_obeys_call_timeouts_and_expiry(stage: Stage) -> None:
    with running(2, call_timeout=0.05, lease_grace_seconds=0) as manager:
        lease = manager.acquire_sync(lease_seconds=600)
        with pytest.raises(CallTimeoutError):
            lease.executor.submit(jobs.hold, stage.folder, "too slow").result()
        lease.extend_sync(0.01)
        wait_until(lambda: manager.stats().leases_expired == 1)
        with pytest.raises(LeaseExpiredError):
            lease.executor.submit(jobs.add, 1)
        lease.release_sync()
        stage.let_go()


def test_what_is_submitted_while_the_lease_ends_is_run_or_refused() -> None:
    """No future is left that nobody resolves."""

    def submit(lease: ExecutorLease, go: threading.Event) -> list[Future[int]]:
        futures: list[Future[int]] = []
        go.wait()
        try:
            while True:
                futures.append(lease.executor.submit(jobs.add, 1))
        except LeaseReleasedError:
            return futures

    with ThreadPoolExecutor() as threads, running(2) as manager:
        for _ in range(5):
            with manager.lease_sync() as lease:
                go = threading.Event()
                submitting = [threads.submit(submit, lease, go) for _ in range(3)]
                go.set()
                lease.executor.submit(jobs.add, 1).result()
            futures = [future for each in submitting for future in each.result()]
            assert not wait(futures, timeout=20).not_done


def test_an_executor_dropped_with_its_lease_is_no_reason_to_keep_either() -> None:
    def use_and_drop() -> weakref.ref[ExecutorLease]:
        lease = manager.acquire_sync()
        assert lease.executor.submit(jobs.add, 1).result() == 1
        return weakref.ref(lease)

    with running() as manager, noted_warnings() as warned:
        gone = use_and_drop()
        gc.collect()
        assert gone() is None
        wait_until(lambda: warned)
        wait_all_idle(manager)


def test_what_the_executor_cannot_send_is_the_futures_error() -> None:
    with running() as manager, manager.lease_sync() as lease:
        future: Future[Any] = lease.executor.submit(jobs.coroutine_function)
        with pytest.raises(TypeError, match="coroutine function"):
            future.result()
        assert lease.executor.submit(jobs.add, 1).result() == 1
