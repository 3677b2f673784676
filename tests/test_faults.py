"""The manager's own faults: its fork server dies or is stopped, and what it needs runs out.

What functions do to their callers and workers is in `test_process_*.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    WorkerCrashedError,
    WorkerStartError,
)
from leasepool_django.backends.process import ProcessBackend, control, pool
from leasepool_django.backends.process.driver import ProcessWorker
from leasepool_django.engine import Event
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.leaks import Process
from tests.process_pools import CALLERS, Caller, assert_full_capacity, new_manager, running
from tests.process_table import fork_servers, identify, is_alive, state, wait_gone, worker_pids
from tests.waiting import async_wait_until, wait_until

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)

# Within which workers follow what has made them.
SOON = 1.0


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder whose modules can be imported, here and in workers."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def events() -> list[Event]:
    """Collects what a manager tells, once it has been subscribed."""
    return []


def kill_fork_server() -> list[Process]:
    """Kill the only one; returns it and its workers."""
    (server,) = fork_servers()
    gone = [identify(server), *map(identify, worker_pids())]
    os.kill(server, signal.SIGKILL)
    return gone


def texts(events: list[Event], kind: str) -> list[str]:
    return [event.text for event in events if event.kind == kind]


# --- the fork server ------------------------------------------------------------------------------


def test_a_fork_server_killed_while_idle_costs_no_call(tmp_path: Path, events: list[Event]) -> None:
    with running(2) as manager:
        manager.subscribe(events.append)
        gone = kill_fork_server()
        wait_gone(gone, timeout=SOON)
        assert manager.run_sync(jobs.echo, "served") == "served"
        assert len(gone) == 3
        assert fork_servers() != [gone[0].pid]
        assert_full_capacity(manager, tmp_path)
    assert texts(events, "fork_server_lost") == [
        f"The fork server (pid {gone[0].pid}) was killed by SIGKILL."
    ]


def test_a_fork_server_killed_while_workers_are_busy_costs_their_calls_alone(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    async def calls(manager: LeasedExecutorManager) -> None:
        lease = await manager.acquire(workers=1)
        running_calls = [
            asyncio.create_task(run(jobs.hold, tmp_path, name))
            for run, name in [(lease.run, "leased"), (manager.run, "alone")]
        ]
        await async_wait_until(lambda: all((tmp_path / n).exists() for n in ("leased", "alone")))
        waiting = asyncio.create_task(manager.run(jobs.echo, "served"))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        gone = kill_fork_server()
        pids = {process.pid for process in gone[1:]}
        for call in running_calls:
            with pytest.raises(WorkerCrashedError) as caught:
                await call
            error = caught.value
            assert str(error) == (
                f"The worker (pid {error.pid}) running tests.process_jobs.hold died; the fork "
                "server that made it died, and it died with it. It has been replaced; the call was "
                "not repeated."
            )
            assert error.exitcode is None
            assert error.signal_name is None
            assert error.pid in pids
            pids.remove(error.pid)
        assert await waiting == "served"
        assert await lease.run(jobs.echo, "the lease holds") == "the lease holds"
        await lease.release()
        wait_gone(gone, timeout=SOON)

    with running(2) as manager:
        loop_runner(calls(manager))
        assert_full_capacity(manager, tmp_path)


def test_blocking_callers_are_told_when_the_fork_server_is_killed(tmp_path: Path) -> None:
    with running() as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(manager.run_sync, jobs.hold, tmp_path, "holding")
        wait_until((tmp_path / "holding").exists)
        kill_fork_server()
        with pytest.raises(WorkerCrashedError, match="the fork server that made it died"):
            call.result(10)
        assert_full_capacity(manager, tmp_path)


def test_what_workers_had_started_dies_when_the_fork_server_is_killed(tmp_path: Path) -> None:
    """Also what is in a session of its own, and what has lost its parent."""
    with running() as manager:
        started = [identify(pid) for pid in manager.run_sync(jobs.start_and_return)]
        gone = kill_fork_server()
        wait_gone([*gone, *started], timeout=SOON)
        assert len(started) == 6
        assert_full_capacity(manager, tmp_path)


def test_a_stop_with_a_stopped_fork_server_leaves_nothing_that_workers_had_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager kills what the fork server would have killed, before ``stop`` returns."""
    monkeypatch.setattr(control, "EXIT_SECONDS", 0.3)
    with running() as manager:
        started = [identify(pid) for pid in manager.run_sync(jobs.start_and_return)]
        (server,) = fork_servers()
        started.append(identify(server))
        os.kill(server, signal.SIGSTOP)
        manager.stop_sync()
        assert [process for process in started if is_alive(process)] == []
        assert len(started) == 7


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "timed out"])
def test_a_start_that_fails_with_a_stopped_fork_server_leaves_nothing(
    stop: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it is given up or takes too long; what its initializer had started is gone."""
    monkeypatch.setattr(control, "EXIT_SECONDS", 0.3)
    monkeypatch.setattr(pool, "REPORT_SECONDS", 0.3)
    manager = new_manager(
        initializer=jobs.start_and_spin, initargs=[tmp_path / "pids"], start_timeout=3
    )
    with ThreadPoolExecutor(1) as thread:
        start = thread.submit(manager.start_sync)
        wait_until((tmp_path / "pids").exists)
        started = [identify(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
        (server,) = fork_servers()
        os.kill(server, signal.SIGSTOP)
        if stop:
            manager.stop_sync()
        with pytest.raises(LeasePoolNotStartedError if stop else WorkerStartError) as caught:
            start.result(20)
        assert [process for process in started if is_alive(process)] == []
        if not stop:
            assert "did not report the end of a worker" in str(caught.value)


def test_a_fork_server_killed_while_it_prepares_fails_the_start(
    modules: Path, tmp_path: Path
) -> None:
    began = tmp_path / "began"
    (modules / "slow_to_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(began)!r}).touch()\ntime.sleep(60)\n"
    )
    manager = new_manager(preload=["slow_to_import"])
    with ThreadPoolExecutor(1) as thread:
        start = thread.submit(manager.start_sync)
        wait_until(began.exists)
        (server,) = kill_fork_server()
        with pytest.raises(WorkerStartError) as caught:
            start.result(10)
    assert str(caught.value) == f"The fork server (pid {server.pid}) was killed by SIGKILL."
    assert not manager.started


def test_a_fork_server_killed_while_it_makes_workers_is_replaced(
    tmp_path: Path, events: list[Event]
) -> None:
    """Stopped, it has been asked for the workers of a second pool and has not answered."""
    with running(max_pools=2) as manager, ThreadPoolExecutor(1) as thread:
        manager.subscribe(events.append)
        (server,) = fork_servers()
        with manager.lease_sync():
            os.kill(server, signal.SIGSTOP)
            call = thread.submit(manager.run_sync, jobs.echo, "served")
            wait_until(lambda: manager.total_count == 2)
            wait_until(lambda: manager.stats().live_workers == 2)
            kill_fork_server()
            assert call.result(10) == "served"
        assert manager.stats().last_start_error is None
        assert_full_capacity(manager, tmp_path)
    assert "was killed by SIGKILL" in texts(events, "worker_start_failed")[0]


def test_a_fork_server_that_stays_mute_is_replaced(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers do not wait for ever for the report of a worker's end."""
    monkeypatch.setattr(pool, "REPORT_SECONDS", 0.3)
    with running() as manager:
        manager.subscribe(events.append)
        (server,) = fork_servers()
        os.kill(server, signal.SIGSTOP)
        with pytest.raises(CallTimeoutError, match=r"tests\.process_jobs\.hold ran longer than"):
            manager.options(call_timeout=0.1).run_sync(jobs.hold, tmp_path)
        assert manager.run_sync(jobs.echo, "served") == "served"
        assert_full_capacity(manager, tmp_path)
    (text,) = texts(events, "fork_server_lost")
    assert text == (
        f"The fork server (pid {server}) did not report the end of a worker within 0.3 s and was "
        "killed. Was it stopped?"
    )


@each_caller
def test_a_death_that_a_stopped_fork_server_does_not_report_is_not_blamed_on_the_servers(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker had ended by itself, and others of its fork server with it."""
    monkeypatch.setattr(pool, "REPORT_SECONDS", 0.3)
    monkeypatch.setattr(pool, "HANG_UP_SECONDS", 0.05)
    with running() as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(caller.outcome, manager, jobs.hold, tmp_path)
        wait_until((tmp_path / "holding").exists)
        (server,), (worker,) = fork_servers(), worker_pids()
        os.kill(server, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        error = call.result(10)
        assert type(error) is WorkerCrashedError
        assert str(error) == (
            f"The worker (pid {worker}) running tests.process_jobs.hold died; its end was not "
            "reported, because its fork server was stopped or hung. It has been replaced; the call "
            "was not repeated."
        )
        assert_full_capacity(manager, tmp_path)


def test_a_late_report_is_not_held_against_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was killed is not said to have cut its connection."""
    late = threading.Event()
    unreported = ProcessBackend._unreported

    def spy(backend: ProcessBackend, worker: ProcessWorker) -> None:
        unreported(backend, worker)
        late.set()

    monkeypatch.setattr(ProcessBackend, "_unreported", spy)
    monkeypatch.setattr(pool, "HANG_UP_SECONDS", 0.05)
    with running() as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(manager.run_sync, jobs.hold, tmp_path)
        wait_until((tmp_path / "holding").exists)
        (server,), (worker,) = fork_servers(), worker_pids()
        os.kill(server, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        assert late.wait(10)
        os.kill(server, signal.SIGCONT)
        with pytest.raises(WorkerCrashedError) as caught:
            call.result(10)
        assert str(caught.value) == (
            f"The worker (pid {worker}) running tests.process_jobs.hold was killed by SIGKILL; "
            "often that is the kernel's out-of-memory killer. It has been replaced; the call was "
            "not repeated."
        )
        assert_full_capacity(manager, tmp_path)


def test_signals_to_every_process_of_a_service_cost_no_call(tmp_path: Path) -> None:
    """As a service manager sends them: only the server decides."""
    with running(2) as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(manager.run_sync, jobs.hold, tmp_path, "holding")
        wait_until((tmp_path / "holding").exists)
        before = {*fork_servers(), *worker_pids()}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for pid in before:
                os.kill(pid, number)
        (tmp_path / "go").touch()
        assert call.result(10) in before
        assert_full_capacity(manager, tmp_path)
        assert {*fork_servers(), *worker_pids()} == before


def test_a_call_is_not_lost_with_a_pool_that_dies_at_once(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    """As when a container's memory runs out; however many dead workers it is given."""

    async def calls(manager: LeasedExecutorManager) -> list[int]:
        assert await manager.run(jobs.echo, 0) == 0
        (server,) = fork_servers()
        workers = worker_pids()
        os.kill(server, signal.SIGSTOP)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: {state(worker) for worker in workers} == {"Z"})
        answers = [asyncio.create_task(manager.run(jobs.echo, n)) for n in range(3)]
        await async_wait_until(lambda: manager.stats().waiting == len(answers))
        os.kill(server, signal.SIGCONT)
        found: list[int] = await asyncio.gather(*answers)
        return found

    with running(6) as manager:
        assert loop_runner(calls(manager)) == [0, 1, 2]
        assert_full_capacity(manager, tmp_path)
