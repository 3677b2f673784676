"""Leases beyond the contract all backends share: expiry, renewal, neglect, waiting for oneself."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from leasepool_django import (
    ExecutorLease,
    LeaseExpiredError,
    LeaseReleasedError,
    LeaseUnavailableError,
)
from leasepool_django.engine import Event, LeasedExecutorManager
from leasepool_django.engine import calls as calls_module
from tests import jobs
from tests.managers import noted_warnings, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


class Told:
    """The events of a manager, in order."""

    def __init__(self, manager: LeasedExecutorManager) -> None:
        self.events: list[Event] = []
        manager.subscribe(self.events.append)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind.startswith("lease_")]


# --- expiry ---------------------------------------------------------------------------------------


def test_the_deadlines_of_a_lease_are_its_seconds_and_its_grace(stage: Stage) -> None:
    before = time.monotonic()
    with (
        running(default_lease_seconds=100, lease_grace_seconds=20) as manager,
        manager.lease_sync() as lease,
    ):
        assert (lease.lease_seconds, lease.grace_seconds) == (100, 20)
        assert before + 100 <= lease.soft_expires_at <= time.monotonic() + 100
        assert lease.hard_expires_at == lease.soft_expires_at + 20
        assert manager.name in lease.lease_id


def test_a_lease_past_its_soft_expiry_is_told_of_once_and_still_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(lease_grace_seconds=600) as manager:
        told = Told(manager)
        with manager.lease_sync(lease_seconds=0.05, owner="slow one") as lease:
            wait_until(lambda: "lease_expiring" in told.kinds())
            assert lease.run_sync(jobs.add, 1) == 1
        wait_until(lambda: "lease_released" in told.kinds())
        assert told.kinds() == ["lease_acquired", "lease_expiring", "lease_released"]
        facts = {"lease_id": lease.lease_id, "owner": "slow one", "workers": lease.workers}
        assert [event.facts for event in told.events] == [facts] * 3
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.name for record in warned] == ["leasepool"]
    assert "slow one" in warned[0].getMessage()
    assert "extend() renews it" in warned[0].getMessage()


def test_an_idle_lease_is_revoked_at_its_hard_expiry(caplog: pytest.LogCaptureFixture) -> None:
    with running(2, lease_grace_seconds=0.05) as manager:
        told = Told(manager)
        lease = manager.acquire_sync(lease_seconds=0.05)
        wait_until(lambda: manager.stats().idle_workers == 2)
        with pytest.raises(LeaseExpiredError, match=r"expired after 0\.1 s"):
            lease.run_sync(jobs.add, 1)
        wait_until(lambda: "lease_expired" in told.kinds())
        assert told.kinds()[:3] == ["lease_acquired", "lease_expiring", "lease_expired"]
        assert "expired" in repr(lease)
        assert manager.stats().workers_killed == 0
        lease.release_sync()


def test_a_lease_is_revoked_while_its_holders_loop_is_blocked() -> None:
    """Deadlines are the housekeeper's, not the caller's."""

    async def main() -> None:
        lease = await manager.acquire(lease_seconds=0.05)
        wait_until(lambda: manager.stats().leases_expired == 1)  # nothing awaits here
        with pytest.raises(LeaseExpiredError):
            await lease.run(jobs.add, 1)

    with running(lease_grace_seconds=0) as manager:
        asyncio.run(main())


def test_a_lease_can_be_renewed_for_as_long_as_it_is_in_force(stage: Stage) -> None:
    async def main() -> None:
        told = Told(manager)
        async with manager.lease(lease_seconds=0.05, workers=1) as lease:
            begun = lease.soft_expires_at - lease.lease_seconds
            await async_wait_until(lambda: "lease_expiring" in told.kinds())
            before = time.monotonic()
            await lease.extend(200)
            assert before + 200 <= lease.soft_expires_at <= time.monotonic() + 200
            assert lease.hard_expires_at == lease.soft_expires_at + 100
            lease.extend_sync(0.05)
            await async_wait_until(lambda: told.kinds().count("lease_expiring") == 2)
            text = told.events[-1].text
            held = text.partition("is past its ")[2].partition(" s ")[0]
            assert float(held) == pytest.approx(lease.soft_expires_at - begun, rel=1e-3)
            await lease.extend(math.inf)
            assert lease.hard_expires_at == math.inf
            assert manager.stats().leases[0].expires_in is None
        with pytest.raises(LeaseReleasedError):
            await lease.extend(5)

    with running(lease_grace_seconds=100) as manager:
        asyncio.run(main())


def test_a_lease_that_never_ends_may_be_given_an_end() -> None:
    with running(lease_grace_seconds=0) as manager:
        lease = manager.acquire_sync(lease_seconds=math.inf)
        lease.extend_sync(0.05)
        wait_until(lambda: manager.stats().idle_workers == 1)
        with pytest.raises(LeaseExpiredError):
            lease.extend_sync(5)


def test_the_grace_follows_the_soft_expiry_also_when_it_is_set_later() -> None:
    with running(lease_grace_seconds=0.05) as manager:
        with manager.lease_sync(lease_seconds=600) as lease:
            lease.extend_sync(0.05)
            wait_until(lambda: manager.stats().leases_expired == 1)
        assert lease.hard_expires_at - lease.soft_expires_at == pytest.approx(0.05)


# --- neglect --------------------------------------------------------------------------------------


def drop_lease(manager: LeasedExecutorManager, **options: Any) -> str:
    return manager.acquire_sync(**options).lease_id


def test_a_dropped_lease_is_returned_and_warned_about() -> None:
    with running(2) as manager, noted_warnings() as warned:
        lease_id = drop_lease(manager, owner="careless")
        gc.collect()
        wait_until(lambda: manager.stats().idle_workers == 2)
        wait_until(lambda: warned)
        assert len(warned) == 1
        assert f"lease {lease_id} (owner 'careless')" in warned[0]
        assert "dropped without release" in warned[0]


def test_who_has_dropped_a_lease_does_not_wait_for_itself() -> None:
    with running() as manager, noted_warnings() as warned:
        for number in range(50):
            drop_lease(manager)
            assert manager.options(timeout=20).run_sync(jobs.add, number) == number
        wait_until(lambda: len(warned) == 50)


def test_a_dropped_lease_with_running_calls_is_returned_after_them(stage: Stage) -> None:
    with running() as manager, noted_warnings() as warned:
        lease = manager.acquire_sync()
        executor = lease.executor
        future = executor.submit(jobs.hold, stage.folder, "running")
        stage.wait_begun("running")
        del lease
        gc.collect()
        wait_until(lambda: warned)
        assert manager.stats().idle_workers == 0
        with pytest.raises(LeaseReleasedError):
            executor.submit(jobs.add, 1)
        stage.let_go()
        assert future.result() == "running"
        wait_all_idle(manager)


def test_a_released_lease_is_dropped_in_silence() -> None:
    with running() as manager, noted_warnings() as warned:
        with manager.lease_sync():
            pass
        lease = manager.acquire_sync()
        gone = weakref.ref(lease)
        lease.release_sync()
        del lease
        gc.collect()
        assert gone() is None
        drop_lease(manager)
        wait_until(lambda: warned)
        assert len(warned) == 1


def test_a_lease_may_be_collected_while_the_account_is_locked() -> None:
    """The collector runs wherever something is allocated, under the lock as well."""
    with running(2) as manager, noted_warnings() as warned:
        leases = [manager.acquire_sync()]
        with manager._dispatcher.lock:
            leases.clear()
            gc.collect()
        wait_until(lambda: manager.stats().idle_workers == 2)
        wait_until(lambda: warned)


def test_leases_in_rubbish_are_found_whenever_the_collector_runs() -> None:
    """It runs after every few allocations here, in the middle of everything."""

    class Rubbish:
        def __init__(self, lease: ExecutorLease) -> None:
            self.lease = lease
            self.myself = self

    async def neglect() -> None:
        Rubbish(await manager.acquire(timeout=20, workers=1))

    async def main() -> None:
        for number in range(rounds):
            await asyncio.create_task(neglect())
            assert await manager.options(timeout=20).run(jobs.add, number) == number
            gc.collect()

    rounds = 8
    thresholds = gc.get_threshold()
    with running(2) as manager, noted_warnings() as warned:
        gc.set_threshold(3, 1, 1)
        try:
            asyncio.run(main())
        finally:
            gc.set_threshold(*thresholds)
        wait_until(lambda: manager.stats().idle_workers == 2)
        wait_until(lambda: len(warned) == rounds)


def test_an_abandoned_coroutine_gives_back_what_it_held(stage: Stage) -> None:
    """Closed by hand, or by the collector, it cannot await anything any more."""

    async def hold_call() -> None:
        await manager.run(jobs.hold, stage.folder, "call")

    async def wait_for_lease() -> None:
        async with manager.lease():
            raise AssertionError("no lease can be had")

    def begin(coroutine: Any) -> None:
        """Run it up to its first wait and close it, outside a task and in no loop's time."""
        coroutine.send(None)
        coroutine.close()

    async def main() -> None:
        begin(hold_call())
        stage.wait_begun("call")
        await async_wait_until(lambda: manager.stats().calls_abandoned == 1)
        begin(wait_for_lease())
        await async_wait_until(lambda: manager.stats().waiting == 0)
        stage.let_go()
        assert await manager.run(jobs.add, 1) == 1

    with running() as manager:
        asyncio.run(main())
        wait_all_idle(manager)


# --- waiting for oneself --------------------------------------------------------------------------


def test_who_holds_a_lease_and_would_wait_for_it_is_told_so() -> None:
    async def main() -> None:
        async with manager.lease(owner="me") as lease:
            with pytest.raises(LeaseUnavailableError, match="wait for itself") as raised:
                await manager.acquire()
            assert "'me'" in str(raised.value)
            assert lease.lease_id in str(raised.value)
            with pytest.raises(LeaseUnavailableError, match="wait for itself"):
                await manager.run(jobs.add, 1)
            assert manager.stats().waiting == 0
        assert await manager.run(jobs.add, 1) == 1

    with running(2) as manager:
        asyncio.run(main())
        with manager.lease_sync():
            with pytest.raises(LeaseUnavailableError, match="wait for itself"):
                manager.acquire_sync(workers=1)
            with pytest.raises(LeaseUnavailableError, match="wait for itself"):
                manager.run_sync(jobs.add, 1)


def test_two_leases_of_one_task_that_together_leave_no_room_are_both_seen() -> None:
    with running(2) as manager, manager.lease_sync(workers=1) as first:
        assert manager.run_sync(jobs.add, 1) == 1
        with (
            manager.lease_sync(workers=1),
            pytest.raises(LeaseUnavailableError, match="wait for itself"),
        ):
            manager.acquire_sync(workers=1)
        assert first.run_sync(jobs.add, 1) == 1


def test_who_holds_a_lease_may_wait_for_what_others_hold(stage: Stage) -> None:
    """Or for a pool that can still be added."""
    with ThreadPoolExecutor() as threads:
        with running(2) as manager, manager.lease_sync(workers=1):
            other = threads.submit(manager.run_sync, jobs.hold, stage.folder, "other")
            stage.wait_begun("other")
            stage.let_go()
            with manager.lease_sync(workers=1, timeout=20) as lease:
                assert lease.run_sync(jobs.add, 1) == 1
            assert other.result() == "other"
        with running(max_pools=2) as manager, manager.lease_sync():
            assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1


def test_another_task_of_the_same_loop_may_wait(stage: Stage) -> None:
    async def main() -> None:
        async with manager.lease():
            other = asyncio.create_task(manager.run(jobs.add, 1))
            await async_wait_until(lambda: manager.stats().waiting == 1)
        assert await other == 1

    with running() as manager:
        asyncio.run(main())


def test_a_lease_says_what_it_is() -> None:
    with running(2) as manager:
        with manager.lease_sync(owner="me", workers=1) as lease:
            assert repr(lease) == f"<ExecutorLease {lease.lease_id} open owner='me' workers=1>"
        assert "released" in repr(lease)


def test_a_lease_that_ends_while_it_is_dropped_is_returned_once() -> None:
    """Neither twice nor with a warning: the housekeeper comes too late to return it."""
    with running(2) as manager, noted_warnings() as warned:
        supervisor = manager._supervisor
        busy, go_on = threading.Event(), threading.Event()
        leases = [manager.acquire_sync()]
        state = leases[0]._state

        def be_busy() -> None:
            busy.set()
            go_on.wait(10)

        supervisor.post(be_busy)
        assert busy.wait(10)
        leases.clear()
        gc.collect()
        manager._calls.release(state)
        go_on.set()
        done = threading.Event()
        supervisor.post(done.set)
        assert done.wait(10)
        assert manager.stats().idle_workers == 2
    assert warned == []


def test_a_grant_that_comes_when_the_time_is_up_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a blocking caller, between the end of its wait and its leaving the line."""

    class Late:
        """A lock whose time is up; meanwhile the lease that was waited for is released."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.lock.acquire()
            self.waits = 0

        def acquire(self, *, timeout: float = -1) -> bool:
            self.waits += 1
            if self.waits == 1:
                held.release_sync()
                return False
            return bool(self.lock.acquire(timeout=timeout))

        def release(self) -> None:
            self.lock.release()

    with running() as manager, ThreadPoolExecutor(1) as threads:
        for ask in (manager.acquire_sync, lambda timeout: manager.options(timeout=timeout)):
            held = threads.submit(manager.acquire_sync).result()
            with monkeypatch.context() as patched:
                patched.setattr(calls_module, "_locked", Late)
                got = ask(timeout=0.01)
                if isinstance(got, ExecutorLease):
                    assert got.workers == 1
                    got.release_sync()
                else:
                    assert got.run_sync(jobs.add, 1) == 1
        assert manager.stats().idle_workers == 1
