"""No worker, caller or deadline is lost when something goes wrong at an unlucky moment."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import (
    LeasedExecutorManager,
    LeaseExpiredError,
    LeaseReleasedError,
    LeaseTimeoutError,
    LeaseUnavailableError,
)
from leasepool_django.engine import Event, supervisor
from tests import jobs, process_jobs
from tests.managers import new_manager, noted_warnings, running
from tests.process_pools import run_program
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

# --- retries --------------------------------------------------------------------------------------


def test_the_time_between_retries_has_a_limit_however_many_there_were() -> None:
    assert [supervisor._delay(failures) for failures in (0, 1, 2, 3)] == [0.1, 0.1, 0.2, 0.4]
    assert supervisor._delay(10) == supervisor._delay(10**6) == 30.0


def test_a_worker_that_dies_at_once_is_retried_less_and_less_while_others_start() -> None:
    starts = 0
    manager = new_manager(min_pools=2, max_pools=2)
    backend, host = manager._backend, manager._supervisor
    start, ready = backend.start_worker, host.worker_ready

    def start_worker(slot: Any) -> None:
        nonlocal starts
        if slot.pool.number == 1:  # the second is never ready
            starts += 1
            start(slot)

    def worker_ready(slot: Any, worker: Any) -> None:
        ready(slot, worker)
        host.post(lambda: worker._leave(crashed=True))

    backend.start_worker = start_worker  # type: ignore[method-assign]
    host.worker_ready = worker_ready  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(manager.start_sync)
        wait_until(lambda: starts >= 4)
        begin = time.monotonic()
        wait_until(lambda: starts >= 5)
        assert time.monotonic() - begin > 0.1
        manager.stop_sync(grace=0)
        assert starting.exception() is not None
    assert starts < 10


# --- draining -------------------------------------------------------------------------------------


def test_a_lease_gets_new_workers_while_the_manager_drains() -> None:
    with running(backend="process", max_tasks_per_child=1) as manager:
        with manager.lease_sync() as lease:
            manager.request_stop(grace=30)
            wait_until(lambda: manager.stats().state == "stopping")
            pids = {lease.run_sync(os.getpid) for _ in range(3)}
            assert len(pids) == 3
        wait_until(lambda: manager.stats().state == "stopped")


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_extended_at_the_last_moment_is_not_revoked() -> None:
    events: list[Event] = []
    with running(lease_grace_seconds=0) as manager:
        manager.subscribe(events.append)
        lease = manager.acquire_sync(lease_seconds=60)
        dispatcher = manager._dispatcher
        (state,) = dispatcher.leases
        state.hard_expires_at = time.monotonic() - 1
        due = dispatcher.look(time.monotonic())
        assert due.hard == [state]
        lease.extend_sync(60)
        assert dispatcher.revoke(state) is None
        assert lease.run_sync(jobs.add, 1) == 1
        lease.release_sync()
        wait_until(lambda: any(event.kind == "lease_released" for event in events))
        assert not any(event.kind == "lease_expired" for event in events)


def test_a_lease_that_was_handed_over_is_not_waited_for_in_vain() -> None:
    """The task that acquires leases for others holds none of them."""

    async def work(lease: Any) -> int:
        async with lease:
            return int(await lease.run(jobs.pause, 0.1, 1))

    async def main() -> list[int]:
        tasks = []
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                lease = await manager.acquire(workers=1, timeout=20)
                tasks.append(group.create_task(work(lease)))
        return [task.result() for task in tasks]

    with running(2) as manager:
        assert asyncio.run(main()) == [1, 1, 1, 1]


def test_one_who_would_wait_for_itself_is_told_apart_from_one_who_may_try_again() -> None:
    async def main() -> None:
        async with manager.lease():
            with pytest.raises(LeaseUnavailableError, match="wait for itself") as refused:
                await manager.run(jobs.add, 1)
            assert refused.value.waits_for_itself
            with pytest.raises(LeaseUnavailableError) as full:
                await asyncio.create_task(manager.acquire(wait=False))
            assert not full.value.waits_for_itself

    with running() as manager:
        asyncio.run(main())


def test_options_keep_their_lease() -> None:
    with noted_warnings() as warned, running() as manager:
        call = manager.acquire_sync().options(call_timeout=20)
        gc.collect()
        assert call.run_sync(jobs.add, 1) == 1
        del call
        gc.collect()
        wait_until(lambda: warned)


def test_a_lease_that_is_over_says_why() -> None:
    with running(lease_grace_seconds=0) as manager:
        lease = manager.acquire_sync(lease_seconds=60)
        lease.extend_sync(0.05)
        with pytest.raises(LeaseExpiredError, match=r"expired after 0\.\d+ s and was revoked"):
            wait_until(lambda: lease.run_sync(jobs.add, 1) is None)
        kept = manager.acquire_sync()
    with pytest.raises(LeaseReleasedError, match="ended when its manager stopped"):
        kept.run_sync(jobs.add, 1)


# --- who waits ------------------------------------------------------------------------------------


def test_a_call_whose_worker_had_died_waits_no_longer_than_it_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had found a worker at once, and has to stand in line after all."""

    async def main() -> None:
        pid = await manager.run(os.getpid)
        monkeypatch.setattr(manager._backend, "start_worker", lambda slot: None)
        blocked, go = threading.Event(), threading.Event()
        # The housekeeper does not hear of the end before the call is made.
        manager._supervisor.post(lambda: (blocked.set(), go.wait(20)))  # type: ignore[func-returns-value, arg-type]
        assert blocked.wait(20)
        os.kill(pid, signal.SIGKILL)
        worker: Any = manager._dispatcher.line.pools[0].slots[0].worker
        await async_wait_until(lambda: worker.is_dead)
        call = asyncio.create_task(manager.run(jobs.add, 1))
        await async_wait_until(lambda: manager.stats().waiting)
        go.set()
        with pytest.raises(LeaseTimeoutError, match=r"within 0\.3 s"):
            await asyncio.wait_for(call, 20)

    with running(backend="process", acquire_timeout=0.3) as manager:
        asyncio.run(main())


def test_a_call_that_cannot_be_begun_when_its_turn_comes_fails_alone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no thread can be started for it."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith("-inline"):
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main() -> None:
        first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        second = asyncio.create_task(manager.run(jobs.add, 1))
        await async_wait_until(lambda: manager.stats().waiting)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            stage.let_go()
            await first
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await asyncio.wait_for(second, 20)
        assert await asyncio.wait_for(manager.run(jobs.add, 2), 20) == 2

    with running(backend="inline") as manager:
        asyncio.run(main())


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.run_sync(jobs.add, 1),
        lambda manager: manager.options(timeout=1).run_sync(jobs.add, 1),
        lambda manager: manager.acquire_sync(),
        lambda manager: manager.lease_sync().__enter__(),
    ],
)
def test_blocking_callers_are_refused_on_a_running_event_loop(call: Any) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"would block the event loop .* Use `await "):
            call(manager)
        async with manager.lease() as lease:
            with pytest.raises(RuntimeError, match="would block the event loop"):
                lease.run_sync(jobs.add, 1)
            future = lease.executor.submit(jobs.add, 1)
            assert await asyncio.wrap_future(future) == 1
            assert await asyncio.to_thread(lease.run_sync, jobs.add, 2) == 2

    with running() as manager:
        asyncio.run(main())


# --- user code ------------------------------------------------------------------------------------


def test_a_subscriber_that_cannot_say_what_it_wants_holds_nothing_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wants(kind: str) -> bool:
        raise ValueError("no idea")

    told: list[Event] = []
    manager = new_manager()
    manager.subscribe(told.append, wants=wants)
    manager.subscribe(told.append)
    manager.start_sync()
    try:
        assert manager.run_sync(jobs.add, 1) == 1
        wait_until(lambda: any(event.kind == "worker_started" for event in told))
    finally:
        manager.stop_sync()
    assert "a subscriber raised on worker_started" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_no_subscriber_can_end_the_thread_that_tells(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def call(event: Event) -> None:
        told.append(event.kind)
        if event.kind == "lease_acquired":
            raise error

    with running() as manager:
        manager.subscribe(call)
        for _ in range(2):
            manager.acquire_sync().release_sync()
        wait_until(lambda: told.count("lease_released") == 2)
    assert "a subscriber raised on lease_acquired" in caplog.text


def test_a_snapshot_runs_no_code_of_a_callable_under_the_lock(stage: Stage) -> None:
    class Asks:
        def __call__(self) -> str:
            return jobs.hold(stage.folder, "asks")

        def __getattr__(self, name: str) -> Any:
            manager.estimated_wait()  # takes the lock
            raise AttributeError(name)

    with running() as manager, ThreadPoolExecutor() as threads:
        call = threads.submit(manager.run_sync, Asks())
        stage.wait_begun("asks")
        (worker,) = manager.stats().pools[0].workers
        assert worker.function is not None
        assert "Asks" in worker.function
        stage.let_go()
        assert call.result(20) == "asks"


# --- lives ----------------------------------------------------------------------------------------

FORKED = """
    import os

    from leasepool_django import LeasedExecutorManager
    from tests import jobs


    class Starting(LeasedExecutorManager):
        def ensure_running_sync(self):
            self.start_sync()


    if __name__ == "__main__":
        manager = Starting(max_pools=1, workers_per_pool=1)
        call = manager.options(timeout=20)
        assert call.run_sync(jobs.add, 1) == 1
        pid = os.fork()
        if not pid:
            print(call.run_sync(jobs.add, 2), flush=True)
            manager.stop_sync()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print(call.run_sync(jobs.add, 3))
        manager.stop_sync()
"""


def test_options_made_before_a_fork_work_after_it(tmp_path: Path) -> None:
    ended = run_program(tmp_path, FORKED)
    assert (ended.returncode, ended.stdout) == (0, "2\n3\n"), ended.stderr


def test_a_start_after_a_failed_one_hears_nothing_of_it(tmp_path: Path) -> None:
    """Also where several workers fail one after the other."""
    needed = tmp_path / "needed"
    options: dict[str, Any] = {"initializer": jobs.need, "initargs": (needed,)}
    for backend in ("inline", "process"):
        for _ in range(10 if backend == "inline" else 2):
            manager = LeasedExecutorManager(
                backend=backend, max_pools=1, workers_per_pool=4, **options
            )
            with pytest.raises(Exception, match="needed is missing"):
                manager.start_sync()
            needed.touch()
            manager.start_sync()
            manager.stop_sync()
            needed.unlink()


def test_a_manager_stopped_while_it_started_says_that_it_was_stopped(tmp_path: Path) -> None:
    manager = new_manager(
        backend="process",
        initializer=process_jobs.initialize_until,
        initargs=(tmp_path / "go",),
    )
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(manager.start_sync)
        wait_until(lambda: manager.stats().state == "starting")
        manager.stop_sync(grace=0)
        assert starting.exception() is not None
    with pytest.raises(Exception, match="has been stopped"):
        manager.run_sync(jobs.add, 1)
