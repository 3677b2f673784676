"""Start and stop beyond the contract: from signals, other loops, forks, and at the wrong moment."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_futures
from typing import Any

import pytest

from leasepool_django import (
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    LeaseReleasedError,
    WorkerStartError,
)
from leasepool_django import worker as worker_module
from tests import jobs
from tests.conftest import LoopRunner
from tests.managers import new_manager, running
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


@pytest.fixture
def slow_start(stage: Stage) -> Iterator[LeasedExecutorManager]:
    """A manager whose workers get ready when the stage lets "start" go; stopped afterwards."""
    manager = new_manager(initializer=jobs.wait_for, initargs=(stage.folder, "start"))
    yield manager
    stage.let_go("start")
    manager.stop_sync(grace=0)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# --- start ----------------------------------------------------------------------------------------


def test_many_callers_start_it_once(
    loop_runner: LoopRunner, slow_start: LeasedExecutorManager, stage: Stage
) -> None:
    manager = slow_start

    async def main() -> None:
        starts = [asyncio.create_task(manager.start()) for _ in range(5)]
        await async_wait_until(lambda: manager.stats().state == "starting")
        blocking = [threads.submit(manager.start_sync) for _ in range(3)]
        done, _ = await asyncio.wait(starts, timeout=0.05)
        assert not done
        stage.let_go("start")
        await asyncio.gather(*starts)
        await asyncio.gather(*map(asyncio.wrap_future, blocking))

    with ThreadPoolExecutor() as threads:
        loop_runner(main())
    stats = manager.stats()
    assert (stats.state, stats.workers_started, len(stats.pools)) == ("running", 1, 1)


def test_who_gives_up_a_start_does_not_end_it_for_others(
    slow_start: LeasedExecutorManager, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the loop that waited for it is closed by then."""
    manager = slow_start
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(manager.start(), 0.02))
    assert manager.stats().state == "starting"
    stage.let_go("start")
    manager.start_sync()
    assert manager.run_sync(jobs.add, 1) == 1
    assert errors(caplog) == []


def test_a_stop_ends_a_start_that_is_under_way(slow_start: LeasedExecutorManager) -> None:
    manager = slow_start
    with ThreadPoolExecutor() as threads:
        starting = threads.submit(manager.start_sync)
        wait_until(lambda: manager.stats().state == "starting")
        manager.stop_sync()
        with pytest.raises(LeasePoolNotStartedError, match="was stopped while it started"):
            starting.result()
    assert manager.stats().state == "stopped"
    with pytest.raises(LeasePoolNotStartedError):
        manager.run_sync(jobs.add, 1)


def test_work_is_refused_before_the_start_is_complete(slow_start: LeasedExecutorManager) -> None:
    manager = slow_start
    with ThreadPoolExecutor() as threads:
        starting = threads.submit(manager.start_sync)
        wait_until(lambda: manager.stats().state == "starting")
        with pytest.raises(LeasePoolNotStartedError, match="Await start"):
            manager.run_sync(jobs.add, 1)
        manager.stop_sync()
        assert isinstance(starting.exception(), LeasePoolNotStartedError)


def test_a_start_that_fails_at_once_does_not_spoil_the_next_one() -> None:
    """The pools that were still to be started are not counted."""
    options: dict[str, Any] = {"thread_name_prefix": 5, "initializer": "not callable"}
    manager = new_manager(2, min_pools=3, max_pools=3, **options)
    for _ in range(2):
        with pytest.raises(WorkerStartError, match="initializer must be a callable"):
            manager.start_sync()
        assert manager.total_count == 0
        assert manager.stats().state == "stopped"


def test_a_manager_is_not_started_inside_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module._state, "in_worker", True)
    manager = new_manager()
    with pytest.raises(LeasePoolNotStartedError, match="if __name__ == '__main__'"):
        asyncio.run(manager.start())
    with pytest.raises(LeasePoolNotStartedError, match="inside a worker"):
        manager.start_sync()


def test_a_subclass_may_start_itself_when_it_is_needed(loop_runner: LoopRunner) -> None:
    class Lazy(LeasedExecutorManager):
        async def ensure_running(self) -> None:
            await self.start()

        def ensure_running_sync(self) -> None:
            self.start_sync()

    async def main() -> None:
        results = await asyncio.gather(*(manager.run(jobs.add, number) for number in range(20)))
        assert results == list(range(20))
        await manager.stop()
        async with await manager.acquire() as lease:
            assert await lease.run(jobs.add, 1) == 1
        await manager.stop()

    manager = Lazy(backend="thread", max_pools=1, workers_per_pool=2)
    loop_runner(main())
    assert manager.run_sync(jobs.add, 1) == 1
    manager.stop_sync()
    with manager.acquire_sync() as lease:
        assert lease.run_sync(jobs.add, 1) == 1
    manager.stop_sync()
    # Four starts, each of which is over with the first worker; a stop may come before the other.
    assert 4 <= manager.stats().workers_started <= 8


def test_a_thread_that_cannot_be_started_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the limit of threads; nothing is left, and the next start works."""
    manager = new_manager()
    for failing in ("-notifier", "-housekeeper"):
        start = threading.Thread.start

        def refuse(
            thread: threading.Thread,
            failing: str = failing,
            start: Callable[[threading.Thread], None] = start,
        ) -> None:
            if thread.name.endswith(failing):
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                manager.start_sync()
        assert manager.stats().state == "new"
        gc.collect()
    manager.start_sync()
    manager.stop_sync()


# --- stop -----------------------------------------------------------------------------------------


def test_a_manager_that_never_started_is_stopped_already(loop_runner: LoopRunner) -> None:
    manager = new_manager()
    loop_runner(manager.stop())
    manager.stop_sync()
    manager.request_stop()
    assert manager.stats().state == "new"


def test_any_loop_or_thread_may_stop_it(loop_runner: LoopRunner) -> None:
    manager = new_manager(2)
    loop_runner(manager.start())
    assert loop_runner(manager.run(jobs.add, 1)) == 1
    with ThreadPoolExecutor() as threads:
        stops = [threads.submit(lambda: loop_runner(manager.stop())) for _ in range(3)]
        stops += [threads.submit(manager.stop_sync) for _ in range(3)]
        assert not wait_futures(stops, timeout=20).not_done
        assert [stop.result() for stop in stops] == [None] * 6
    assert manager.stats().state == "stopped"


def test_who_gives_up_waiting_for_a_stop_does_not_end_it(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as manager, ThreadPoolExecutor() as threads:
        call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "call")
        stage.wait_begun("call")
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(manager.stop(), 0.02))
        assert manager.stats().state == "stopping"
        stage.let_go()
        assert call.result() == "call"
        wait_until(lambda: manager.stats().state == "stopped")
    assert errors(caplog) == []


def test_a_signal_handler_may_request_the_stop(stage: Stage) -> None:
    """Also while the thread it interrupts holds the account's lock."""
    with running() as manager, ThreadPoolExecutor() as threads:
        call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "call")
        stage.wait_begun("call")
        before = signal.signal(signal.SIGUSR1, lambda *_: manager.request_stop())
        try:
            with manager._dispatcher.lock:
                signal.raise_signal(signal.SIGUSR1)
            wait_until(lambda: manager.stats().state == "stopping")
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        with pytest.raises(LeasePoolNotStartedError):
            manager.run_sync(jobs.add, 1)
        stage.let_go()
        assert call.result() == "call"
        wait_until(lambda: manager.stats().state == "stopped")
        manager.request_stop()


def test_a_requested_stop_leaves_leases_to_their_holders_and_may_begin_later() -> None:
    with running() as manager:
        with manager.lease_sync() as lease:
            manager.request_stop(grace=600, after=0.05)
            assert manager.started
            wait_until(lambda: manager.stats().state == "stopping")
            assert lease.run_sync(jobs.add, 1) == 1
            assert lease.run_sync(jobs.add, 2) == 2
        wait_until(lambda: manager.stats().state == "stopped")


def test_a_stop_ends_the_leases_that_a_requested_one_left() -> None:
    with running() as manager, manager.lease_sync() as lease:
        manager.request_stop(grace=600)
        wait_until(lambda: manager.stats().state == "stopping")
        manager.stop_sync()
        with pytest.raises(LeaseReleasedError):
            lease.run_sync(jobs.add, 1)


def test_a_lease_may_be_used_while_the_manager_drains_and_not_after(stage: Stage) -> None:
    async def main() -> None:
        lease = await manager.acquire()
        call = asyncio.create_task(lease.run(jobs.hold, stage.folder, "call"))
        await stage.wait_begun_async("call")
        stopping = asyncio.create_task(manager.stop())
        await async_wait_until(lambda: manager.stats().state == "stopping")
        following = asyncio.create_task(lease.run(jobs.begin, stage.folder, "following"))
        await async_wait_until(lambda: manager.stats().leases[0].waiting == 1)
        stage.let_go()
        assert await call == "call"
        assert await following == "following"
        await stopping
        with pytest.raises(LeaseReleasedError):
            await lease.run(jobs.add, 1)
        await lease.release()

    with running() as manager:
        asyncio.run(main())


def test_an_idle_lease_does_not_hold_up_a_stop() -> None:
    with running(shutdown_grace_seconds=600) as manager:
        lease = manager.acquire_sync()
        manager.stop_sync()
        with pytest.raises(LeaseReleasedError):
            lease.run_sync(jobs.add, 1)


def test_a_grant_that_was_not_picked_up_is_refused_by_a_stop(
    loop_runner: LoopRunner, stage: Stage
) -> None:
    """Of a call: its caller, whose loop stood still, is told that the manager has stopped."""
    with running() as manager, ThreadPoolExecutor() as threads:
        held = threads.submit(manager.run_sync, jobs.hold, stage.folder, "held")
        stage.wait_begun("held")
        loop = loop_runner.new_event_loop()
        try:
            call = loop.create_task(manager.run(jobs.begin, stage.folder, "call"))
            loop.run_until_complete(async_wait_until(lambda: manager.stats().waiting == 1))
            stage.let_go()
            assert held.result() == "held"
            assert manager.stats().busy_workers == 1  # granted, and nobody takes it
            manager.stop_sync(grace=0)
            with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
                loop.run_until_complete(call)
        finally:
            loop.close()
    assert stage.begun() == ["held"]


# --- forks ----------------------------------------------------------------------------------------


def in_a_fork(child: Callable[[], bool]) -> bool:
    """Run ``child`` in a fork of this process and return what it returned."""
    with warnings.catch_warnings():
        # There are threads, so Python 3.12 and later warn.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            signal.alarm(30)
            os._exit(0 if child() else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), f"the child was killed by signal {os.WTERMSIG(status)}"
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_fork_gets_a_manager_of_its_own(backend: str) -> None:
    def child() -> bool:
        started = manager.started
        manager.start_sync()
        result = manager.run_sync(jobs.add, 1)
        manager.stop_sync()
        return (started, result) == (False, 1)

    with running(2, backend=backend) as manager:
        before = manager.run_sync(jobs.whoami)[0]
        assert in_a_fork(child)
        assert manager.run_sync(jobs.add, 1) == 1
        if backend == "process":
            assert manager.stats().workers_started == 2
        assert manager.run_sync(jobs.whoami)[0] in {before, *worker_pids(manager)}


def worker_pids(manager: LeasedExecutorManager) -> set[int | None]:
    return {worker.pid for pool in manager.stats().pools for worker in pool.workers}


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_fork_can_do_nothing_with_the_leases_it_inherits(backend: str) -> None:
    def child() -> bool:
        with pytest.raises(LeaseReleasedError, match="parent of this process"):
            lease.run_sync(jobs.add, 1)
        with pytest.raises(LeaseReleasedError):
            asyncio.run(lease.run(jobs.add, 1))
        with pytest.raises(LeaseReleasedError):
            lease.executor.submit(jobs.add, 1)
        with pytest.raises(LeaseReleasedError):
            lease.extend_sync(5)
        lease.release_sync()
        return True

    with running(backend=backend) as manager, manager.lease_sync() as lease:
        assert in_a_fork(child)
        assert lease.run_sync(jobs.add, 1) == 1


@pytest.mark.parametrize("state", ["never started", "stopped"])
def test_a_fork_of_a_manager_that_does_not_run_may_start_it(state: str) -> None:
    def child() -> bool:
        manager.start_sync()
        result = manager.run_sync(jobs.add, 1)
        manager.stop_sync()
        return result == 1

    manager = new_manager()
    if state == "stopped":
        manager.start_sync()
        manager.stop_sync()
    assert in_a_fork(child)
    assert not manager.started
