"""What is lost with machines, servers and messages between them, and what is not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from leasepool_django import (
    LeasePoolError,
    LeaseTimeoutError,
    WorkerCrashedError,
    WorkerStartError,
)
from leasepool_django.backends.dask import cluster as cluster_module
from leasepool_django.backends.dask import host
from leasepool_django.backends.dask.backend import DaskBackend
from leasepool_django.backends.dask.cluster import Cluster
from tests import dask_jobs, jobs
from tests.dask_cluster import cluster, running
from tests.managers import new_manager
from tests.process_jobs import echo, hold
from tests.process_pools import ROOT, start_program
from tests.waiting import wait_until

# They wait for what takes seconds, and on a busy machine for seconds more.
pytestmark = pytest.mark.slow

SETTINGS = {"DJANGO_SETTINGS_MODULE": "tests.settings"}


@pytest.fixture(scope="module", autouse=True)
def address() -> Iterator[str]:
    """The scheduler of a cluster of two processes with one thread each."""
    with cluster(2, **SETTINGS) as found:
        # Dask keeps a thread for what is large, once there was something: no test's leak.
        with running(found) as manager:
            manager.run_sync(echo, bytes(30 << 20))
        yield found


def test_a_machine_that_is_lost_costs_its_calls_and_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        other = asyncio.create_task(manager.run(hold, tmp_path, "other"))
        await asyncio.to_thread(wait_until, (tmp_path / "other").exists)
        with pytest.raises(WorkerCrashedError) as raised:
            await manager.run(dask_jobs.kill_host)
        assert raised.value.function == "tests.dask_jobs.kill_host"
        assert "The call was not repeated." in str(raised.value)
        (tmp_path / "go").touch()
        await other

    # A cluster of its own: the process that Dask starts in its place ends with it.
    with cluster(2) as address, running(address, 2) as manager:
        asyncio.run(main())
        wait_until(lambda: manager.stats().idle_workers == 2, timeout=30)
        assert manager.run_sync(jobs.add, 1) == 1


SILENT = """
    import asyncio, pathlib, sys
    from leasepool_django import LeasedExecutorManager
    from tests.process_jobs import hold

    async def main(address, folder):
        manager = LeasedExecutorManager(
            backend="dask", address=address, max_pools=1, workers_per_pool=1
        )
        await manager.start()
        await manager.run(hold, pathlib.Path(folder), "held")

    if __name__ == "__main__":
        asyncio.run(main(*sys.argv[1:]))
"""


def tell_hosts(address: str, seconds: float) -> None:
    """Have them take a server for gone after so many seconds."""

    def change(seconds: float) -> None:
        host.SILENT_SECONDS = seconds

    with Client(address, set_as_default=False) as client:
        client.run(change, seconds)


@pytest.fixture
def impatient_hosts(address: str) -> Iterator[None]:
    tell_hosts(address, 3.0)
    yield
    tell_hosts(address, 15.0)


@pytest.fixture
def quick_beats(impatient_hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides say more, and wait less for the other."""
    monkeypatch.setattr(cluster_module, "_BEAT_SECONDS", 0.3)
    monkeypatch.setattr(cluster_module, "_HEAR_SECONDS", 1.5)
    monkeypatch.setattr(cluster_module, "SILENT_SECONDS", 3.0)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text(), timeout=20)
    return int(path.read_text())


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_the_calls_of_a_killed_server_end(address: str, tmp_path: Path) -> None:
    with start_program(tmp_path, SILENT, address, tmp_path) as server:
        pid = pid_in(tmp_path / "held")
        server.kill()
    tell_hosts(address, 1.0)
    try:
        wait_until(lambda: is_gone(pid))
    finally:
        tell_hosts(address, 15.0)


def test_a_server_that_was_taken_for_gone_gets_new_seats(address: str) -> None:
    with running(address, 2) as manager:
        tell_hosts(address, 1.0)  # it says something less often than that
        wait_until(lambda: manager.stats().workers_crashed >= 2, timeout=20)
        tell_hosts(address, 15.0)
        wait_until(lambda: manager.stats().idle_workers == 2, timeout=20)
        assert manager.run_sync(jobs.add, 1) == 1


@pytest.mark.usefixtures("quick_beats")
def test_an_initializer_may_take_longer_than_a_server_may_be_silent(address: str) -> None:
    with running(address, initializer=dask_jobs.take_long, initargs=(5.0,)) as manager:
        assert manager.run_sync(jobs.add, 1) == 1
        assert manager.stats().start_failures == 0


@pytest.mark.usefixtures("quick_beats")
def test_a_host_that_hangs_costs_its_calls_and_its_capacity_comes_back(
    address: str, tmp_path: Path
) -> None:
    async def main() -> None:
        held = asyncio.create_task(manager.run(hold, tmp_path, "held"))
        pid = await asyncio.to_thread(pid_in, tmp_path / "held")
        dask_process = dask_jobs.parent(dask_jobs.parent(pid))
        os.kill(dask_process, signal.SIGSTOP)
        try:
            with pytest.raises(WorkerCrashedError, match="nothing is heard of it any more"):
                await asyncio.wait_for(held, 20)
            # The other host has a seat.
            assert await asyncio.wait_for(manager.run(jobs.add, 1), 20) == 1
        finally:
            os.kill(dask_process, signal.SIGCONT)
        await asyncio.to_thread(wait_until, lambda: is_gone(pid))

    with running(address) as manager:
        asyncio.run(main())
        wait_until(lambda: manager.stats().idle_workers == 1, timeout=20)
        assert manager.run_sync(jobs.add, 1) == 1


@pytest.mark.usefixtures("quick_beats")
def test_a_scheduler_that_says_nothing_for_a_moment_costs_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failures: list[object] = []
    listed = Cluster._listed

    async def fail_twice(self: Cluster) -> dict[str, Any]:
        if len(failures) < 2:
            failures.append(None)
            raise OSError("too many open files")
        return await listed(self)

    with running(address) as manager, ThreadPoolExecutor() as threads:
        held = threads.submit(manager.run_sync, hold, tmp_path, "held")
        pid = pid_in(tmp_path / "held")
        monkeypatch.setattr(Cluster, "_listed", fail_twice)
        wait_until(lambda: len(failures) == 2)
        (tmp_path / "go").touch()
        assert held.result(20) == pid
        assert manager.stats().workers_crashed == 0


@pytest.mark.usefixtures("quick_beats")
def test_a_call_whose_connection_is_lost_does_not_go_on(address: str, tmp_path: Path) -> None:
    with running(address) as manager, ThreadPoolExecutor() as threads:
        held = threads.submit(manager.run_sync, hold, tmp_path, "held")
        pid = pid_in(tmp_path / "held")
        backend = manager._supervisor._backend
        assert isinstance(backend, DaskBackend)

        async def lose() -> None:
            for at in backend.cluster._hosts.values():
                for task in at.calls.values():
                    task.cancel()

        backend.cluster.do(lose()).result(20)
        with pytest.raises(WorkerCrashedError):
            held.result(20)
        assert manager.run_sync(jobs.add, 1) == 1
        wait_until(lambda: is_gone(pid))


def test_a_call_that_is_cancelled_on_its_way_does_not_run(address: str, tmp_path: Path) -> None:
    """Or, if it has begun just then, is stopped before its seat has another."""
    begun = tmp_path / "begun"

    async def main() -> None:
        for megabytes, seconds in [(30, 0.05), (30, 0.2), (0, 0.0), (0, 0.001)] * 2:
            call = manager.run(dask_jobs.begin, begun, bytes(megabytes << 20))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(call, seconds)
            assert await asyncio.wait_for(manager.run(jobs.add, 1), 10) == 1
            if begun.exists():
                assert is_gone(int(begun.read_text()))
                begun.unlink()
        assert not begun.exists()

    with running(address) as manager:
        asyncio.run(main())


def test_a_host_that_ends_gently_fails_its_calls(tmp_path: Path) -> None:
    """It gives up what it does, which is not the caller's doing."""
    with (
        cluster(0) as address,
        subprocess.Popen(
            [sys.executable, "-m", "dask", "worker", address, "--no-nanny", "--nthreads", "1"],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDEVMODE": "", "PYTHONWARNINGS": ""},
        ) as dask_worker,
    ):
        try:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=20)
            with running(address) as manager, ThreadPoolExecutor() as threads:
                held = threads.submit(manager.run_sync, hold, tmp_path, "held")
                pid_in(tmp_path / "held")
                dask_worker.terminate()
                with pytest.raises(WorkerCrashedError):
                    held.result(20)
        finally:
            dask_worker.kill()


# -- starts ----------------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_replaced_holds_up_nobody(address: str, tmp_path: Path) -> None:
    """Callers wait in the line, for as long as they want, and are told why."""
    once: dict[str, Any] = {
        "initializer": dask_jobs.start_once,
        "initargs": (tmp_path / "started",),
    }
    with running(address, acquire_timeout=3.0, **once) as manager:
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.die, 1)
        with pytest.raises(LeaseTimeoutError, match="Workers cannot be started: A worker"):
            manager.run_sync(jobs.add, 1)
        assert "only once" in str(manager.stats().last_start_error)


def test_the_time_of_a_call_begins_when_its_worker_is_ready(address: str) -> None:
    slow: dict[str, Any] = {"initializer": dask_jobs.take_long, "initargs": (3.0,)}
    with running(address, call_timeout=2.0, **slow) as manager:
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.die, 1)
        assert manager.run_sync(jobs.add, 1) == 1


def test_a_worker_that_has_had_enough_calls_is_replaced(address: str) -> None:
    slow: dict[str, Any] = {"initializer": dask_jobs.take_long, "initargs": (1.0,)}
    with running(address, call_timeout=0.9, max_tasks_per_child=1, **slow) as manager:
        pids = {manager.run_sync(jobs.whoami)[0] for _ in range(3)}
        assert len(pids) == 3
        assert manager.stats().workers_crashed == 0


def test_a_host_where_nothing_starts_leaves_the_others_to_all(address: str, tmp_path: Path) -> None:
    """And a manager takes seats of several hosts evenly."""
    with Client(address, set_as_default=False) as client:
        bad, good = client.run(os.getpid).values()
    refusing: dict[str, Any] = {"initializer": dask_jobs.refuse_in, "initargs": (bad,)}
    with running(address, **refusing) as manager:
        for _ in range(3):
            assert manager.run_sync(dask_jobs.surroundings_of_host) == good
            with pytest.raises(WorkerCrashedError):
                manager.run_sync(jobs.die, 1)
            wait_until(lambda: manager.stats().idle_workers == 1, timeout=20)


def test_a_scheduler_that_hangs_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as silent:  # it takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        manager = new_manager(backend="dask", address=address, connect_timeout=1.0)
        with pytest.raises(WorkerStartError, match="cannot be reached within 1 s"):
            manager.start_sync()


def test_one_that_stops_while_it_starts_has_no_seat_left(address: str) -> None:
    async def main() -> None:
        for number in range(8):
            manager = new_manager(2, backend="dask", address=address)
            starting = asyncio.create_task(manager.start())
            await asyncio.sleep(0.05 * number)
            await manager.stop(grace=0)
            with suppress(LeasePoolError):
                await starting

    asyncio.run(main())
    with running(address, 2) as manager:  # both are free
        assert manager.run_sync(jobs.add, 1) == 1
