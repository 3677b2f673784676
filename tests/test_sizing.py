"""How many pools there are: bounds, growth for those who wait, the sizing rule, and shrinking."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager, LeaseTimeoutError, LeaseUnavailableError
from leasepool_django.engine import Event
from tests import jobs
from tests.managers import new_manager, running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


class Pools:
    """Watches how many pools there are."""

    def __init__(self, manager: LeasedExecutorManager) -> None:
        self.manager = manager
        self.changes: list[str] = []
        manager.subscribe(self._note)

    def _note(self, event: Event) -> None:
        if event.kind in {"pool_added", "pool_closed"}:
            self.changes.append(event.kind)

    def wait(self, count: int) -> None:
        wait_until(lambda: self.manager.total_count == count, message=self.manager.describe)

    def stay(self, count: int) -> None:
        """Hold that a look at the sizes, just now, has left ``count`` pools."""
        self.manager.notify_scale_changed()
        self.settle()
        assert self.manager.total_count == count

    def settle(self) -> None:
        """Wait until the notifier and the housekeeper have done what they had to do."""
        supervisor = self.manager._supervisor
        for done in (threading.Event(), threading.Event()):
            supervisor.hand_over(partial(supervisor.post, done.set))
            assert done.wait(10)


@contextmanager
def several(manager: LeasedExecutorManager, count: int) -> Iterator[None]:
    """Hold whole-pool leases, each in the name of another thread."""
    with ThreadPoolExecutor(count) as threads, ExitStack() as stack:
        barrier = threading.Barrier(count)

        def acquire() -> Any:
            barrier.wait()
            return manager.acquire_sync(timeout=20)

        for future in [threads.submit(acquire) for _ in range(count)]:
            stack.enter_context(future.result())
        yield


# --- bounds and growth ----------------------------------------------------------------------------


def test_a_start_makes_the_least_number_of_pools() -> None:
    with running(2, min_pools=2, max_pools=3) as manager:
        assert manager.total_count == 2
        assert manager.stats().idle_workers == 4
        assert manager.desired_executor_count() == 2


def test_a_pool_is_added_when_the_first_in_line_finds_no_room() -> None:
    with running(2, max_pools=3) as manager:
        assert manager.total_count == 1
        with several(manager, 3):
            assert manager.total_count == 3
            assert manager.stats().idle_workers == 0
            with ThreadPoolExecutor(1) as another, pytest.raises(LeaseTimeoutError):
                another.submit(manager.acquire_sync, timeout=0.05).result()
            assert manager.total_count == 3
        wait_all_idle(manager)


def test_a_pool_is_added_for_calls_that_wait_as_well(stage: Stage) -> None:
    async def main() -> None:
        calls = [asyncio.create_task(manager.run(jobs.hold, stage.folder, n)) for n in "abc"]
        await stage.wait_begun_async(*"abc")
        stage.let_go()
        await asyncio.gather(*calls)

    with running(max_pools=3) as manager:
        asyncio.run(main())
        assert manager.total_count == 3


def test_one_pool_is_added_at_a_time(stage: Stage) -> None:
    """While it gets ready, nobody knows whether it will do for those who wait."""

    async def main() -> None:
        first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        (stage.folder / "go-start").unlink()
        others = [asyncio.create_task(manager.run(jobs.add, number)) for number in range(3)]
        await async_wait_until(lambda: manager.total_count == 2)
        pools.settle()
        assert manager.total_count == 2
        assert manager.stats().waiting == 3
        stage.let_go("start")
        assert await asyncio.gather(*others) == [0, 1, 2]
        stage.let_go()
        await first

    stage.let_go("start")
    options: dict[str, Any] = {"initializer": jobs.wait_for, "initargs": (stage.folder, "start")}
    with running(2, max_pools=4, **options) as manager:
        pools = Pools(manager)
        with manager.lease_sync(workers=1):
            asyncio.run(main())
        assert manager.total_count <= 4


def test_who_does_not_wait_is_refused_and_the_next_one_finds_room() -> None:
    with running(max_pools=2) as manager, several(manager, 1):
        with pytest.raises(LeaseUnavailableError):
            manager.acquire_sync(wait=False)
        Pools(manager).wait(2)
        wait_until(lambda: manager.stats().idle_workers == 1)
        with manager.acquire_sync(wait=False) as lease:
            assert lease.run_sync(jobs.add, 1) == 1


def test_partial_leases_and_calls_are_packed_into_as_few_pools_as_possible() -> None:
    """So that a whole pool stays free for who wants a whole one."""
    with running(2, min_pools=2, max_pools=2) as manager:
        with manager.lease_sync(workers=1):
            for _ in range(5):
                assert manager.run_sync(jobs.add, 1) == 1
            with manager.lease_sync(workers=1):
                assert manager.available_count == 1
                with manager.lease_sync(workers=2) as whole:
                    assert whole.workers == 2
        assert manager.available_count == 2


# --- the sizing rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "pools"), [(0, 2), (-5, 2), (20, 2), (21, 3), (40, 4), (41, 4), (10_000, 4)]
)
def test_the_sizing_rule_divides_units_by_pools_and_stays_within_the_bounds(
    units: int, pools: int
) -> None:
    manager = new_manager(min_pools=2, max_pools=4, size_provider=lambda: units)
    assert manager.desired_executor_count() == pools


def test_units_per_pool_may_be_changed() -> None:
    manager = new_manager(max_pools=9, units_per_pool=3, size_provider=lambda: 10)
    assert manager.desired_executor_count() == 4


def fail() -> int:
    raise OSError("no numbers today")


@pytest.mark.parametrize("provider", [fail, lambda: "many", lambda: float("nan")])
def test_a_size_provider_that_fails_is_logged_and_counts_as_nothing(
    provider: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with running(min_pools=2, max_pools=4, size_provider=provider) as manager:
        Pools(manager).stay(2)
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert {record.getMessage() for record in logged} == {"leasepool: size_provider raised"}
    assert all(record.exc_info for record in logged)


def test_the_rule_is_asked_after_the_start_and_when_it_is_told_that_scale_has_changed() -> None:
    units = 25
    with running(max_pools=4, size_provider=lambda: units) as manager:
        pools = Pools(manager)
        pools.wait(3)
        units = 40
        pools.stay(4)
        units = 11
        manager.notify_scale_changed()
        pools.wait(2)
        units = 0
        manager.notify_scale_changed()
        pools.wait(1)
        wait_all_idle(manager)
        assert manager.run_sync(jobs.add, 1) == 1


def test_the_rule_is_asked_at_every_check_interval() -> None:
    asked: list[int] = []

    def provider() -> int:
        asked.append(1)
        return 4 * len(asked)

    with running(max_pools=2, check_interval=0.02, size_provider=provider) as manager:
        Pools(manager).wait(2)
    assert len(asked) >= 3


def test_a_size_provider_may_block_and_nothing_else_does(stage: Stage) -> None:
    def provider() -> int:
        jobs.hold(stage.folder, "provider")
        return 20

    with running(max_pools=2, size_provider=provider) as manager:
        stage.wait_begun("provider")
        assert manager.options(call_timeout=20).run_sync(jobs.add, 1) == 1
        assert manager.total_count == 1
        stage.let_go()
        Pools(manager).wait(2)


def test_an_answer_that_comes_when_the_manager_stops_is_not_needed(stage: Stage) -> None:
    def provider() -> int:
        jobs.hold(stage.folder, "provider")
        return 30

    with (
        running(max_pools=3, size_provider=provider) as manager,
        ThreadPoolExecutor() as threads,
    ):
        call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "call")
        stage.wait_begun("provider", "call")
        stopping = threads.submit(manager.stop_sync)
        wait_until(lambda: manager.stats().state == "stopping")
        stage.let_go("provider")
        Pools(manager).settle()
        assert manager.total_count == 1
        stage.let_go()
        call.result()
        stopping.result()


def test_a_size_provider_may_use_the_manager() -> None:
    def provider() -> int:
        return 10 * manager.run_sync(jobs.add, 1, 1)

    manager = new_manager(max_pools=3, size_provider=provider)
    manager.start_sync()
    try:
        Pools(manager).wait(2)
    finally:
        manager.stop_sync()


def test_scale_of_a_manager_that_does_not_run_may_change(stage: Stage) -> None:
    manager = new_manager(max_pools=3, size_provider=lambda: 30)
    manager.notify_scale_changed()
    manager.start_sync()
    Pools(manager).wait(3)
    manager.stop_sync()
    manager.notify_scale_changed()
    assert manager.total_count == 0


# --- shrinking ------------------------------------------------------------------------------------


def test_idle_pools_above_the_target_are_closed_at_the_next_check() -> None:
    with running(2, max_pools=3, check_interval=600) as manager:
        pools = Pools(manager)
        with several(manager, 3):
            pools.stay(3)
        wait_all_idle(manager)
        manager.notify_scale_changed()
        pools.wait(1)
        wait_all_idle(manager)
        assert manager.stats().idle_workers == 2
        wait_until(lambda: pools.changes.count("pool_closed") == 2)


def test_idle_pools_are_closed_by_the_clock() -> None:
    with running(max_pools=3, check_interval=0.05) as manager:
        with several(manager, 3):
            pass
        Pools(manager).wait(1)


def test_pools_in_use_are_not_closed(stage: Stage) -> None:
    with running(2, max_pools=3) as manager, ThreadPoolExecutor() as threads:
        pools = Pools(manager)
        with several(manager, 3):
            pass
        wait_all_idle(manager)
        with manager.lease_sync(workers=1):
            call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "call")
            stage.wait_begun("call")
            with manager.lease_sync(workers=2):
                manager.notify_scale_changed()
                pools.wait(2)
                pools.stay(2)
            stage.let_go()
            assert call.result() == "call"


@contextmanager
def closing(manager: LeasedExecutorManager) -> Iterator[None]:
    """Let the second pool be in the midst of closing: its workers are too slow to leave."""
    stopped = [worker.pid for worker in manager.stats().pools[1].workers if worker.pid]
    assert len(stopped) == 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        manager.notify_scale_changed()
        wait_until(lambda: states(manager)[2:] == ["stopping"] * 2)
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def states(manager: LeasedExecutorManager) -> list[str]:
    return [worker.state for pool in manager.stats().pools for worker in pool.workers]


def test_who_waits_while_a_pool_closes_is_served_by_one_that_takes_its_place() -> None:
    with running(2, max_pools=2, backend="process") as manager, ThreadPoolExecutor() as threads:
        with several(manager, 2):
            pass
        wait_all_idle(manager)
        with several(manager, 1):
            first = {worker.pid for pool in manager.stats().pools for worker in pool.workers}
            with closing(manager):
                waiting = threads.submit(manager.acquire_sync, timeout=20)
                wait_until(lambda: manager.stats().waiting == 1)
                assert manager.total_count == 2
            with waiting.result() as lease:
                assert lease.run_sync(jobs.whoami)[0] not in first


def test_a_larger_target_is_reached_although_a_pool_was_closing_when_it_was_set() -> None:
    units = 20
    with running(2, max_pools=2, size_provider=lambda: units, backend="process") as manager:
        pools = Pools(manager)
        pools.wait(2)
        wait_all_idle(manager)
        units = 0
        with closing(manager):
            units = 20
            pools.stay(2)
        wait_until(lambda: states(manager) == ["idle"] * 4)
        wait_until(lambda: pools.changes[-2:] == ["pool_closed", "pool_added"])


# --- the bound ------------------------------------------------------------------------------------


def test_there_are_never_more_workers_than_the_bound_allows(tmp_path: Path) -> None:
    """Under calls, leases, cancellations and changes of size at once."""
    most = 0
    units = 0

    async def load(number: int) -> None:
        for turn in range(6):
            kind = (number + turn) % 3
            if kind == 0:
                await manager.run(jobs.add, turn)
            elif kind == 1:
                async with manager.lease(workers=1 + turn % 2) as lease:
                    await lease.run(jobs.add, turn)
            else:
                task = asyncio.ensure_future(manager.run(jobs.pause, 30))
                await asyncio.sleep(0.005 * turn)
                task.cancel()
                await asyncio.wait([task])

    async def watch(tasks: list[asyncio.Task[None]]) -> None:
        nonlocal most, units
        while not all(task.done() for task in tasks):
            most = max(most, manager.stats().live_workers)
            units = (units + 10) % 40
            manager.notify_scale_changed()
            await asyncio.sleep(0.005)

    async def main() -> None:
        tasks = [asyncio.create_task(load(number)) for number in range(8)]
        await watch(tasks)
        await asyncio.gather(*tasks)

    with running(2, max_pools=2, size_provider=lambda: units, backend="process") as manager:
        asyncio.run(main())
    assert 2 <= most <= 4
