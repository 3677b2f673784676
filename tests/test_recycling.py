"""Workers that are replaced as they grow old or fat: unnoticed, and never beyond the bound."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.engine import Event, WorkerStats
from tests import fault_jobs
from tests import process_jobs as jobs
from tests.chaos.watch import Sampler, resident_bytes
from tests.conftest import LoopRunner
from tests.process_pools import assert_full_capacity, running
from tests.process_table import fork_servers, worker_pids
from tests.waiting import wait_until


def test_one_call_for_each_worker_under_load_comes_to_an_end(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    """No deadlock, no call for a worker that has had its own, no worker above the bound."""
    count = 60
    offences: list[str] = []

    async def calls(manager: LeasedExecutorManager) -> list[int]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*(manager.run(os.getpid) for _ in range(count)))

    with (
        running(3, max_tasks_per_child=1) as manager,
        ThreadPoolExecutor(3) as threads,
        Sampler(manager, offences.append, 1.0).sampling() as samples,
    ):
        blocking = threads.map(manager.run_sync, [os.getpid] * count)
        pids = [*loop_runner(calls(manager)), *blocking]
        assert len(set(pids)) == 2 * count
        assert_full_capacity(manager, tmp_path)
        stats = manager.stats()
        assert stats.workers_crashed == stats.start_failures == 0
        wait_until(lambda: samples.most == 3)
    assert not offences


def test_a_worker_that_is_replaced_costs_no_wait_while_another_is_idle(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    """The fork server is stopped: there is no replacement to wait for."""
    with running(3, max_tasks_per_child=1) as manager:
        (server,) = fork_servers()
        os.kill(server, signal.SIGSTOP)
        first = manager.options(timeout=5).run_sync(os.getpid)
        second = loop_runner(manager.options(timeout=5).run(os.getpid))
        with manager.lease_sync(workers=1, timeout=5) as lease:
            third = lease.run_sync(os.getpid)
        assert len({first, second, third}) == 3
        os.kill(server, signal.SIGCONT)
        assert_full_capacity(manager, tmp_path)


def test_a_worker_that_has_grown_too_fat_is_replaced_after_its_call(tmp_path: Path) -> None:
    megabyte = 1 << 20
    events: list[Event] = []
    with running() as manager:
        lean = resident_bytes(manager.run_sync(os.getpid))
    with running(max_rss_per_child=lean + 100 * megabyte) as manager:
        manager.subscribe(events.append)
        pids = [manager.run_sync(fault_jobs.leak, 60 * megabyte) for _ in range(6)]
        # Two calls fit into one worker, and no third.
        assert pids[0::2] == pids[1::2]
        assert len(set(pids)) == 3
        assert_full_capacity(manager, tmp_path)
        (worker,) = worker_pids()
        assert resident_bytes(worker) < lean + 50 * megabyte
        stats = manager.stats()
        assert stats.workers_crashed == stats.workers_killed == 0
    retired = [event.facts["pid"] for event in events if event.kind == "worker_retired"]
    assert retired[:3] == pids[0::2]


@pytest.mark.slow
def test_an_argument_of_a_gigabyte_is_read_and_let_go(tmp_path: Path) -> None:
    size = 1 << 30
    with running() as manager:
        with mmap.mmap(-1, size) as memory:
            memory[size - 1] = 7
            with memoryview(memory) as view:
                assert manager.run_sync(fault_jobs.last, view) == (size, 7)
        assert manager.run_sync(jobs.echo, "served") == "served"
        assert_full_capacity(manager, tmp_path)
    wait_until(lambda: "memfd:leasepool" not in Path("/proc/self/maps").read_text())


def test_who_holds_a_lease_may_wait_for_the_room_of_a_pool_that_closes(tmp_path: Path) -> None:
    """One of its workers is stopped, so that it leaves no sooner than it is told to go on."""
    target = 2
    with (
        running(2, max_pools=2, units_per_pool=1, size_provider=lambda: target) as manager,
        ThreadPoolExecutor(1) as thread,
    ):
        wait_until(lambda: manager.stats().idle_workers == 4)
        with manager.lease_sync():
            worker = next(w.pid for w in workers(manager) if w.state == "idle")
            assert worker is not None
            os.kill(worker, signal.SIGSTOP)
            target = 1
            manager.notify_scale_changed()
            wait_until(
                lambda: [w.pid for w in workers(manager) if w.state == "stopping"] == [worker]
            )

            def go_on() -> None:
                wait_until(lambda: manager.stats().waiting == 1)
                os.kill(worker, signal.SIGCONT)

            gone_on = thread.submit(go_on)
            with manager.lease_sync(timeout=20) as other:
                assert other.workers == 2
            gone_on.result(20)
        assert_full_capacity(manager, tmp_path)


def workers(manager: LeasedExecutorManager) -> list[WorkerStats]:
    return [worker for pool in manager.stats().pools for worker in pool.workers]
