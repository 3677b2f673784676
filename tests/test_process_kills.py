"""Work that is given up ends, with everything it had started, and nothing outlives the server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from leasepool_django import CallTimeoutError, LeaseExpiredError
from leasepool_django.engine import LeasedExecutorManager
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.leaks import Process
from tests.process_pools import assert_full_capacity, running, start_program
from tests.process_table import children, identify, is_alive, wait_gone
from tests.waiting import async_wait_until, wait_until

ONE_SECOND = 1.0  # the contract's


def announced(path: Path) -> list[Process]:
    """Wait for the pids in ``path``."""
    wait_until(path.exists, timeout=20, message=f"{path.name} was not announced")
    return [identify(int(pid)) for pid in path.read_text().split()]


async def cancelled_while_it_burns(manager: LeasedExecutorManager, path: Path) -> list[Process]:
    """Cancel a call that has started programs; what belonged to it."""
    task = asyncio.create_task(manager.run(jobs.start_and_spin, path))
    await async_wait_until(path.exists)
    processes = announced(path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return processes


def test_a_cancelled_call_ends_with_all_it_had_started(
    loop_runner: LoopRunner, tmp_path: Path
) -> None:
    """Programs in sessions of their own and daemons too; the capacity comes back."""
    with running() as manager:
        processes = loop_runner(cancelled_while_it_burns(manager, tmp_path / "pids"))
        assert len(processes) == 6
        wait_gone(processes, timeout=ONE_SECOND)
        wait_until(lambda: manager.stats().workers_killed == 1)  # once the end is reported
        assert_full_capacity(manager, tmp_path)


def test_a_call_that_times_out_ends_with_all_it_had_started(tmp_path: Path) -> None:
    """For blocking callers as for others."""
    path = tmp_path / "pids"
    with running() as manager:
        with pytest.raises(CallTimeoutError, match=r"start_and_spin ran longer than .* 2 s"):
            manager.options(call_timeout=2).run_sync(jobs.start_and_spin, path)
        wait_gone([p for p in announced_before(path) if is_alive(p)], timeout=ONE_SECOND)
        assert_full_capacity(manager, tmp_path)


def announced_before(path: Path) -> list[Process]:
    """Those of ``path`` that are still there."""
    found = []
    for pid in path.read_text().split():
        try:
            found.append(identify(int(pid)))
        except AssertionError:
            continue
    return found


def test_an_expired_lease_ends_its_calls(loop_runner: LoopRunner, tmp_path: Path) -> None:
    """Its callers are told, and the lease's workers serve others."""

    async def expire(manager: LeasedExecutorManager) -> list[Process]:
        async with manager.lease(lease_seconds=0.5, owner="the one who stays") as lease:
            task = asyncio.create_task(lease.run(jobs.start_and_spin, tmp_path / "pids"))
            await async_wait_until((tmp_path / "pids").exists)
            processes = announced(tmp_path / "pids")
            with pytest.raises(LeaseExpiredError, match="the one who stays"):
                await task
        return processes

    with running(lease_grace_seconds=0.5) as manager:
        processes = loop_runner(expire(manager))
        wait_gone(processes, timeout=ONE_SECOND)
        assert_full_capacity(manager, tmp_path)


def test_capacity_answers_soon_after_a_cancel(tmp_path: Path) -> None:
    """Nothing waits for a tick on the way; the benchmarks have the figure."""

    async def again(manager: LeasedExecutorManager) -> float:
        times = []
        for number in range(10):
            path = tmp_path / f"spin-{number}"
            task = asyncio.create_task(manager.run(jobs.spin, path))
            await async_wait_until(path.exists)
            begin = time.monotonic()
            task.cancel()
            await manager.run(jobs.echo, 1)
            times.append(time.monotonic() - begin)
        return sorted(times)[len(times) // 2]

    with running() as manager:
        # A tick of the housekeeper's is a second: far less means that nothing waited for one.
        assert asyncio.run(again(manager)) < 0.5


SERVER = """
    import asyncio, sys
    from pathlib import Path
    from leasepool_django.engine import LeasedExecutorManager
    from tests import process_jobs as jobs

    async def main(folder):
        manager = LeasedExecutorManager(
            max_pools=1, workers_per_pool=3, mp_context=sys.argv[2]
        )
        await manager.start()
        calls = [manager.run(jobs.start_and_spin, folder / f"pids-{n}") for n in range(2)]
        await asyncio.gather(*calls)

    if __name__ == "__main__":
        asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_nothing_outlives_a_killed_server_by_a_second(method: str, tmp_path: Path) -> None:
    """Neither idle nor burning workers, nor the fork server, nor what they had started."""
    with start_program(tmp_path, SERVER, tmp_path, method) as server:
        try:
            processes = announced(tmp_path / "pids-0") + announced(tmp_path / "pids-1")
            processes += [
                identify(pid)
                for fork_server in children(server.pid)
                for pid in [fork_server, *children(fork_server)]
            ]
        finally:
            os.kill(server.pid, signal.SIGKILL)
        wait_gone(processes, timeout=ONE_SECOND)


ENDS = {
    "return": "pass",
    "sys.exit": "sys.exit(5)",
    "exception": "raise RuntimeError('at the end')",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_nothing_outlives_a_program_that_ends_without_stop(end: str, tmp_path: Path) -> None:
    """However it ends, and with a worker still at work for a thread."""
    text = f"""
        import sys, threading
        from pathlib import Path
        from leasepool_django.engine import LeasedExecutorManager
        from tests import process_jobs as jobs
        from tests.waiting import async_wait_until, wait_until

        if __name__ == "__main__":
            path = Path(sys.argv[1]) / "pids"
            manager = LeasedExecutorManager(max_pools=1, workers_per_pool=2)
            manager.start_sync()
            threading.Thread(
                target=manager.run_sync, args=(jobs.start_and_spin, path), daemon=True
            ).start()
            wait_until(path.exists, timeout=20)
            {end}
    """
    path = tmp_path / "pids"
    with start_program(tmp_path, text, tmp_path) as program:
        wait_until(path.exists, timeout=20, message="nothing was announced")
        processes = announced_before(path)  # some may be gone by now
        program.wait(timeout=20)
    wait_gone(processes, timeout=ONE_SECOND)
