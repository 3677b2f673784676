"""Leases, on every backend: their workers, their own line, their end."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future

import pytest

from leasepool_django import LeaseExpiredError, LeaseReleasedError
from tests import jobs
from tests.conftest import LoopRunner
from tests.contract.conftest import Kind
from tests.managers import wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


def test_a_lease_is_a_whole_pool_unless_workers_are_named(kind: Kind) -> None:
    with kind.running(3) as manager:
        with manager.lease_sync(owner="all") as lease:
            assert (lease.workers, lease.owner) == (3, "all")
            assert manager.stats().idle_workers == 0
        with manager.lease_sync(workers=1) as one, manager.lease_sync(workers=2) as two:
            assert (one.workers, two.workers) == (1, 2)
            assert manager.stats().idle_workers == 0
        assert manager.stats().idle_workers == 3


def test_a_lease_runs_as_many_calls_as_it_has_workers_and_the_rest_in_order(
    kind: Kind, stage: Stage, loop_runner: LoopRunner
) -> None:
    async def main() -> None:
        async with manager.lease(workers=2) as lease:
            calls = []
            for name in "abcdef":
                calls.append(asyncio.create_task(lease.run(jobs.hold, stage.folder, name)))
                if name == "b":
                    await stage.wait_begun_async("a", "b")
            await async_wait_until(lambda: manager.stats().leases[0].waiting == 4)
            assert manager.stats().leases[0].running == 2
            assert manager.stats().idle_workers == 1
            assert len(stage.begun()) == 2
            for leaves, follows in zip("badc", "cdef", strict=True):
                stage.let_go(leaves)
                await stage.wait_begun_async(follows)
            stage.let_go()
            assert await asyncio.gather(*calls) == list("abcdef")
            assert sorted(stage.begun()[:2]) == ["a", "b"]
            assert stage.begun()[2:] == list("cdef")

    with kind.running(3) as manager:
        loop_runner(main())


def test_a_released_lease_takes_no_calls_and_lets_running_ones_finish(
    kind: Kind, stage: Stage
) -> None:
    async def main() -> None:
        lease = await manager.acquire()
        running = asyncio.create_task(lease.run(jobs.hold, stage.folder, "running"))
        await stage.wait_begun_async("running")
        waiting = asyncio.create_task(lease.run(jobs.begin, stage.folder, "waiting"))
        await async_wait_until(lambda: manager.stats().leases[0].waiting == 1)
        await lease.release()
        await lease.release()
        with pytest.raises(LeaseReleasedError, match=lease.lease_id):
            await waiting
        with pytest.raises(LeaseReleasedError):
            await lease.run(jobs.add, 1)
        with pytest.raises(LeaseReleasedError):
            await asyncio.to_thread(lease.run_sync, jobs.add, 1)
        with pytest.raises(LeaseReleasedError):
            lease.executor.submit(jobs.add, 1)
        stage.let_go()
        assert await running == "running"
        assert await manager.run(jobs.add, 1) == 1

    with kind.running() as manager:
        asyncio.run(main())
        assert stage.begun() == ["running"]
        assert manager.stats().workers_killed == 0


def test_leaving_the_block_releases_the_lease(kind: Kind) -> None:
    async def main() -> None:
        async with await manager.acquire() as lease:
            assert await lease.run(jobs.add, 1) == 1
        async with manager.lease() as other:
            assert await other.run(jobs.add, 2) == 2
        with pytest.raises(ZeroDivisionError):
            async with manager.lease():
                raise ZeroDivisionError
        for ended in (lease, other):
            with pytest.raises(LeaseReleasedError):
                await ended.run(jobs.add, 1)

    with kind.running() as manager:
        asyncio.run(main())
        with manager.acquire_sync() as lease:
            assert lease.run_sync(jobs.add, 1) == 1
        with pytest.raises(ZeroDivisionError), manager.lease_sync():
            raise ZeroDivisionError
        with pytest.raises(LeaseReleasedError):
            lease.run_sync(jobs.add, 1)
        assert manager.stats().idle_workers == 1


def test_an_expired_lease_is_revoked_and_its_calls_are_told(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        lease = await manager.acquire(owner="slow one")
        calls = asyncio.gather(
            lease.run(jobs.hold, stage.folder, "async"),
            lease.run(jobs.begin, stage.folder, "waiting"),
        )
        await stage.wait_begun_async("async")
        await lease.extend(0.05)
        with pytest.raises(LeaseExpiredError, match="slow one") as raised:
            await calls
        assert not isinstance(raised.value, LeaseReleasedError)
        assert (raised.value.lease_id, raised.value.owner) == (lease.lease_id, "slow one")
        with pytest.raises(LeaseExpiredError):
            await lease.run(jobs.add, 1)

    with kind.running(lease_grace_seconds=0) as manager:
        asyncio.run(main())
        if not kind.flags.supports_kill:
            stage.let_go("async")
        # Enough to begin; where the caller runs the function itself, that is certain.
        seconds = 1.0 if kind.flags.supports_prompt_deadlines else 0.1
        with (
            manager.lease_sync(lease_seconds=seconds) as lease,
            pytest.raises(LeaseExpiredError),
            kind.time_runs_out(stage, "blocking"),
        ):
            lease.run_sync(jobs.hold, stage.folder, "blocking")
        stage.let_go()
        wait_all_idle(manager)
        assert manager.run_sync(jobs.add, 1) == 1
        stats = manager.stats()
        assert (stats.leases_expired, stats.workers_killed, stats.workers_crashed) == (2, 2, 0)
        assert stage.begun() == ["async", "blocking"]


def test_a_lease_for_ever_has_no_deadlines(kind: Kind) -> None:
    with kind.running() as manager, manager.lease_sync(lease_seconds=math.inf) as lease:
        assert lease.soft_expires_at == lease.hard_expires_at == math.inf
        assert manager.stats().leases[0].expires_in is None
        assert lease.run_sync(jobs.add, 1) == 1


def test_the_leases_executor_is_a_real_one(kind: Kind, stage: Stage) -> None:
    with kind.running(2) as manager, manager.lease_sync() as lease:
        executor = lease.executor
        held = [executor.submit(jobs.hold, stage.folder, name) for name in "ab"]
        stage.wait_begun("a", "b")
        last: Future[str] = executor.submit(jobs.begin, stage.folder, "last")
        withdrawn = executor.submit(jobs.begin, stage.folder, "withdrawn")
        assert withdrawn.cancel()
        stage.let_go()
        assert [future.result() for future in (*held, last)] == ["a", "b", "last"]
        with pytest.raises(ValueError, match="out of stock"):
            executor.submit(jobs.fail, "out of stock").result()
        assert list(executor.map(jobs.add, range(6), range(6))) == [0, 2, 4, 6, 8, 10]
        with executor as same:
            assert same is lease.executor
        with pytest.raises(RuntimeError, match="release the lease"):
            executor.shutdown()
        assert executor.submit(jobs.add, 1).result() == 1
        assert "withdrawn" not in stage.begun()


def test_what_the_executor_has_not_begun_when_the_lease_ends_is_refused(
    kind: Kind, stage: Stage
) -> None:
    with kind.running() as manager:
        with manager.lease_sync() as lease:
            running = lease.executor.submit(jobs.hold, stage.folder, "running")
            stage.wait_begun("running")
            waiting = lease.executor.submit(jobs.begin, stage.folder, "waiting")
        stage.let_go()
        assert running.result() == "running"
        with pytest.raises(LeaseReleasedError):
            waiting.result()
        assert stage.begun() == ["running"]


def test_pools_are_counted_by_what_is_used_of_them(kind: Kind, stage: Stage) -> None:
    def counts() -> tuple[int, int, int]:
        return manager.total_count, manager.leased_count, manager.available_count

    with kind.running(2, min_pools=2, max_pools=2) as manager:
        assert counts() == (2, 0, 2)
        with manager.lease_sync(workers=1):
            assert counts() == (2, 1, 1)
            with manager.lease_sync(workers=1):  # packed into the same pool
                assert counts() == (2, 1, 1)
            with manager.lease_sync():
                assert counts() == (2, 2, 0)
        assert counts() == (2, 0, 2)

        async def main() -> None:
            call = asyncio.create_task(manager.run(jobs.hold, stage.folder, "call"))
            await stage.wait_begun_async("call")
            assert counts() == (2, 1, 1)
            stage.let_go()
            await call

        asyncio.run(main())
        wait_until(lambda: counts() == (2, 0, 2))
