"""What can be seen of a manager: snapshots, estimates, events."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from leasepool_django import LeaseTimeoutError, LeaseUnavailableError
from leasepool_django.engine import Event, LeasedExecutorManager, ManagerStats, WorkerStats
from leasepool_django.engine.line import Call
from tests import jobs
from tests.managers import new_manager, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


def workers(manager: LeasedExecutorManager) -> list[WorkerStats]:
    return [worker for pool in manager.stats().pools for worker in pool.workers]


def states(manager: LeasedExecutorManager) -> list[str]:
    return [worker.state for worker in workers(manager)]


# --- snapshots ------------------------------------------------------------------------------------


def test_a_new_manager_is_empty() -> None:
    stats = new_manager(3, max_pools=2, name_prefix="reports").stats()
    assert stats == ManagerStats(
        name="reports",
        backend="thread",
        state="new",
        pools=(),
        leases=(),
        max_pools=2,
        workers_per_pool=3,
        live_workers=0,
        idle_workers=0,
        busy_workers=0,
        waiting=0,
        longest_wait=0.0,
        calls_started=0,
        calls_finished=0,
        calls_abandoned=0,
        leases_granted=0,
        leases_expired=0,
        rejected=0,
        workers_started=0,
        workers_crashed=0,
        workers_killed=0,
        start_failures=0,
        mean_call_seconds=0.0,
        last_start_error=None,
    )


def test_a_snapshot_cannot_be_changed() -> None:
    with running() as manager, manager.lease_sync():
        stats = manager.stats()
        for snapshot in (stats, stats.pools[0], stats.pools[0].workers[0], stats.leases[0]):
            field = dataclasses.fields(snapshot)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(snapshot, field, None)
        hash(stats)


def test_workers_are_idle_leased_busy_or_starting(stage: Stage) -> None:
    stage.let_go("start")
    with (
        running(3, initializer=jobs.wait_for, initargs=(stage.folder, "start")) as manager,
        ThreadPoolExecutor() as threads,
    ):
        assert states(manager) == ["idle"] * 3
        assert {worker.pid for worker in workers(manager)} == {None}
        with manager.lease_sync(workers=2, owner="me") as lease:
            assert sorted(states(manager)) == ["idle", "leased", "leased"]
            call = threads.submit(lease.run_sync, jobs.hold, stage.folder, "secret argument")
            stage.wait_begun("secret argument")
            assert sorted(states(manager)) == ["busy", "idle", "leased"]
            (busy,) = (worker for worker in workers(manager) if worker.state == "busy")
            assert (busy.function, busy.owner, busy.calls) == ("tests.jobs.hold", "me", 0)
            assert {worker.owner for worker in workers(manager)} == {"me", None}
            assert "secret" not in repr(manager.stats())
            stage.let_go()
            call.result()
        wait_all_idle(manager)
        assert sorted(worker.calls for worker in workers(manager)) == [0, 0, 1]


def test_workers_of_another_process_have_pids_and_are_counted() -> None:
    with running(2, backend="process") as manager:
        pids = {worker.pid for worker in workers(manager)}
        assert manager.stats().live_workers == 2
        assert len(pids) == 2
        assert manager.run_sync(jobs.whoami)[0] in pids


def test_the_owner_of_a_single_call_is_seen(stage: Stage) -> None:
    async def main() -> None:
        call = manager.options(owner="invoice 7").run(jobs.hold, stage.folder, "call")
        task = asyncio.ensure_future(call)
        await stage.wait_begun_async("call")
        assert workers(manager)[0].owner == "invoice 7"
        stage.let_go()
        await task

    with running() as manager:
        asyncio.run(main())
        assert workers(manager)[0].owner is None


class Callable7:
    def __call__(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jobs.add, "tests.jobs.add"),
        (partial(jobs.add, 1), "tests.jobs.add"),
        (jobs.ShopError, "tests.jobs.ShopError"),
        (Callable7(), "tests.test_stats.Callable7"),
        (len, "builtins.len"),
        ([].append, "builtins.list.append"),
    ],
)
def test_a_function_is_called_by_its_name_without_arguments(
    function: Callable[..., object], name: str
) -> None:
    assert Call(None, function, None, None).function_name == name


def test_leases_are_shown_with_what_they_run() -> None:
    with running(2, default_lease_seconds=100, lease_grace_seconds=10) as manager:
        with (
            manager.lease_sync(workers=1, owner="me") as lease,
            manager.lease_sync(workers=1, lease_seconds=math.inf),
        ):
            shown = {one.lease_id: one for one in manager.stats().leases}
            assert len(shown) == 2
            mine = shown.pop(lease.lease_id)
            assert (mine.owner, mine.workers, mine.running, mine.waiting) == ("me", 1, 0, 0)
            assert 0 <= mine.age < 100
            assert mine.expires_in is not None
            assert 10 < mine.expires_in <= 110
            assert shown.popitem()[1].expires_in is None
        assert manager.stats().leases == ()


def test_totals_are_kept() -> None:
    with running(2, lease_grace_seconds=0, max_waiting=1) as manager:
        assert manager.run_sync(jobs.add, 1) == 1
        with pytest.raises(ValueError, match="x"):
            manager.run_sync(jobs.fail, "x")
        with manager.lease_sync(workers=1) as lease:
            assert lease.run_sync(jobs.add, 1) == 1
        lease = manager.acquire_sync(lease_seconds=0.01)
        wait_until(lambda: manager.stats().leases_expired == 1)
        with (
            manager.lease_sync(),
            ThreadPoolExecutor(1) as threads,
            pytest.raises(LeaseUnavailableError),
        ):
            threads.submit(manager.acquire_sync, wait=False).result()
        stats = manager.stats()
        assert (stats.calls_started, stats.calls_finished, stats.calls_abandoned) == (3, 3, 0)
        assert (stats.leases_granted, stats.leases_expired, stats.rejected) == (3, 1, 1)
        assert (stats.workers_started, stats.start_failures) == (2, 0)
    assert manager.stats().pools == ()
    assert manager.stats().calls_started == 3


def test_the_length_of_the_wait_is_seen(stage: Stage) -> None:
    async def main() -> None:
        held = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        assert manager.stats().longest_wait == 0
        waiting = [asyncio.create_task(manager.run(jobs.add, 1)) for _ in range(3)]
        await async_wait_until(lambda: manager.stats().waiting == 3)
        first = manager.stats().longest_wait
        await async_wait_until(lambda: manager.stats().longest_wait > first)
        stage.let_go()
        await asyncio.gather(held, *waiting)
        assert manager.stats().longest_wait == 0

    with running() as manager:
        asyncio.run(main())


def test_the_state_is_told_in_one_line(stage: Stage) -> None:
    with running(2, max_pools=3, name_prefix="reports") as manager:
        with manager.lease_sync(workers=1):
            assert manager.describe() == (
                "reports (thread, running): 1 of 3 pools, 1 idle and 0 busy workers, 1 leases, "
                "0 waiting"
            )
        assert repr(manager) == f"<LeasedExecutorManager {manager.describe()}>"


# --- workers that do not start --------------------------------------------------------------------


def test_workers_that_do_not_start_are_tried_again_ever_more_rarely_and_seen(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    needed = stage.folder / "needed"
    needed.touch()
    retries: list[float] = []
    options = {"backend": "process", "initializer": jobs.need, "initargs": (needed,)}
    with running(1, **options) as manager:
        manager.subscribe(
            lambda event: retries.append(event.facts["retry_in"]),
            wants=lambda kind: kind == "worker_start_failed",
        )
        needed.unlink()
        pid = workers(manager)[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(retries) >= 2)
        assert retries[1] > retries[0] > 0
        wait_until(lambda: states(manager) == ["failed"])
        stats = manager.stats()
        assert stats.workers_crashed == 1
        assert stats.start_failures >= 2
        assert "needed is missing" in (stats.last_start_error or "")
        with pytest.raises(LeaseTimeoutError, match="Workers cannot be started: "):
            manager.options(timeout=0.05).run_sync(jobs.add, 1)
        needed.touch()
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        wait_until(lambda: manager.stats().last_start_error is None)
    assert "next try in" in caplog.text


def test_a_manager_whose_workers_do_not_start_any_more_can_be_stopped(stage: Stage) -> None:
    needed = stage.folder / "needed"
    needed.touch()
    options = {"backend": "process", "initializer": jobs.need, "initargs": (needed,)}
    with running(2, **options) as manager:
        needed.unlink()
        pids = [worker.pid for worker in workers(manager)]
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: states(manager) == ["failed"] * 2)


def test_idle_workers_that_crash_are_replaced() -> None:
    with running(2, backend="process") as manager:
        before = {worker.pid for worker in workers(manager)}
        for pid in before:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: manager.stats().workers_crashed == 2)
        wait_all_idle(manager)
        assert not before & {worker.pid for worker in workers(manager)}
        assert [manager.run_sync(jobs.add, number) for number in range(4)] == [0, 1, 2, 3]


# --- events ---------------------------------------------------------------------------------------


def test_subscribers_are_told_in_order_on_a_thread_of_their_own() -> None:
    events: list[Event] = []
    manager = new_manager(name_prefix="reports")
    manager.subscribe(events.append)
    manager.start_sync()
    with manager.lease_sync(owner="me"):
        pass
    manager.stop_sync()
    kinds = [event.kind for event in events]
    assert kinds[:4] == ["pool_added", "worker_started", "lease_acquired", "lease_released"]
    assert {event.manager for event in events} == {"reports"}
    assert events[2].facts == {"lease_id": "reports-1", "owner": "me", "workers": 1}


def test_a_subscriber_gets_the_kinds_it_wants(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leasepool")
    released: list[str] = []
    asked: list[str] = []

    def wants(kind: str) -> bool:
        asked.append(kind)
        return kind == "lease_released"

    with running() as manager:
        manager.subscribe(lambda event: released.append(event.kind), wants=wants)
        with manager.lease_sync():
            pass
        wait_until(lambda: released)
    assert released == ["lease_released"]
    assert "lease_acquired" in asked


def test_a_subscriber_that_raises_is_logged_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[Event] = []

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    with running() as manager:
        manager.subscribe(fail)
        manager.subscribe(events.append)
        with manager.lease_sync():
            pass
        wait_until(lambda: len(events) == 2)
    assert "a subscriber raised on lease_acquired" in caplog.text


def test_a_log_handler_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Logger):
        def handle(self, record: logging.LogRecord) -> None:
            raise ZeroDivisionError

    with running(logger=Broken("broken", logging.DEBUG)) as manager:
        assert manager.run_sync(jobs.add, 1) == 1
    assert "a notification failed" in caplog.text


def test_events_go_to_the_managers_logger() -> None:
    records: list[logging.LogRecord] = []

    class Own(logging.Logger):
        def handle(self, record: logging.LogRecord) -> None:
            records.append(record)

    with (
        running(logger=Own("own", logging.DEBUG), name_prefix="reports") as manager,
        manager.lease_sync(owner="me"),
    ):
        pass
    texts = [record.getMessage() for record in records]
    assert "reports: lease reports-1 (owner 'me', 1 workers) acquired" in texts
    assert all(text.startswith("reports: ") for text in texts)


def test_a_subscriber_may_use_and_stop_the_manager() -> None:
    results: list[int] = []

    def use(event: Event) -> None:
        if event.kind == "lease_acquired":
            results.append(manager.run_sync(jobs.add, 20, 22))
            manager.request_stop()

    with running(2) as manager:
        manager.subscribe(use)
        with manager.lease_sync(workers=1):
            wait_until(lambda: not manager.started)
        assert results == [42]
        wait_until(lambda: manager.stats().state == "stopped")
