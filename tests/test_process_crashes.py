"""A worker that dies, or that a function maltreats, costs its own call and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeaseExpiredError,
    LeasePoolNotStartedError,
    RemoteError,
    WorkerCrashedError,
)
from leasepool_django.backends.process import tray
from leasepool_django.engine import LeasedExecutorManager
from tests import process_jobs as jobs
from tests.process_pools import CALLERS, Caller, assert_full_capacity, running
from tests.process_table import identify, wait_gone, worker_pids
from tests.waiting import wait_until

callers = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)

# The function and its arguments; exit code, signal and words of the error.
CRASHES = [
    ((jobs.exit_at_once, 3), 3, None, "exited with status 3; something called os._exit()"),
    ((jobs.exit_at_once, 0), 0, None, "exited with status 0"),
    ((jobs.kill_own_process,), None, "SIGKILL", "often that is the kernel's out-of-memory killer"),
    ((jobs.segfault,), None, "SIGSEGV", "usually a fault in an extension module"),
    ((jobs.abort,), None, "SIGABRT", "usually a fault in an extension module"),
]


@callers
@pytest.mark.parametrize(
    ("call", "exitcode", "signal_name", "words"),
    CRASHES,
    ids=["status 3", "status 0", "SIGKILL", "SIGSEGV", "SIGABRT"],
)
def test_a_crash_fails_its_own_call_and_says_how(
    caller: Caller,
    call: tuple[Any, ...],
    exitcode: int | None,
    signal_name: str | None,
    words: str,
    tmp_path: Path,
) -> None:
    """A call on the sibling worker goes on, and full capacity is back."""
    with running(2) as manager:
        (tmp_path / "go").touch()
        crash, held = caller.outcomes(manager, [call, (jobs.hold, tmp_path)])
        assert isinstance(held, int)
        assert type(crash) is WorkerCrashedError
        assert crash.pid not in {None, held}
        assert (crash.exitcode, crash.signal_name) == (exitcode, signal_name)
        assert crash.function == f"tests.process_jobs.{call[0].__name__}"
        text = str(crash)
        assert f"(pid {crash.pid}) running {crash.function}" in text
        assert words in text
        assert "the call was not repeated" in text
        assert_full_capacity(manager, tmp_path)
        assert manager.stats().workers_crashed == 1


@callers
def test_a_call_that_crashes_is_not_run_twice(caller: Caller, tmp_path: Path) -> None:
    """At most once: its mark stands there once."""
    mark = tmp_path / "mark"
    with running() as manager:
        assert type(caller.outcome(manager, jobs.mark_and_die, mark)) is WorkerCrashedError
        assert caller(manager, jobs.echo, 1) == 1
    assert len(mark.read_text().splitlines()) == 1


@callers
def test_a_worker_killed_while_idle_costs_no_call(caller: Caller) -> None:
    """The next call goes to its successor, however early it comes."""
    with running(2) as manager:
        for _ in range(10):
            pid = caller(manager, os.getpid)
            os.kill(pid, signal.SIGKILL)
            assert caller(manager, jobs.echo, "answer") == "answer"


@pytest.mark.skipif(not tray.SUPPORTED, reason="calls go over the socket here")
@callers
def test_a_worker_killed_as_it_receives_a_call_costs_nobody_that_call(
    caller: Caller, tmp_path: Path
) -> None:
    """The kernel gives it the call although it has been killed; it never sees it."""
    mark = tmp_path / "mark"
    with running(initializer=jobs.die_receiving_a_call, initargs=(mark,)) as manager:
        assert mark.exists()
        assert caller(manager, jobs.echo, "answer") == "answer"
        wait_until(lambda: manager.stats().workers_crashed == 1)


@pytest.mark.skipif(not tray.SUPPORTED, reason="calls go over the socket here")
@callers
def test_a_worker_that_hangs_up_as_it_receives_a_call_does_not_have_it_run_twice(
    caller: Caller, tmp_path: Path
) -> None:
    """Nobody knows that it will not begin it."""
    mark = tmp_path / "mark"
    with running(initializer=jobs.hang_up_receiving_a_call) as manager:
        assert type(caller.outcome(manager, jobs.mark_and_measure, mark, b"")) is WorkerCrashedError
    assert len(mark.read_text().splitlines()) == 1


def test_a_stopped_worker_is_still_killed_by_the_time_out(tmp_path: Path) -> None:
    """SIGSTOP holds neither the deadline nor the kill."""
    path = tmp_path / "stopped"
    with running() as manager:
        with pytest.raises(CallTimeoutError, match="stop_own_process ran longer than"):
            manager.options(call_timeout=1).run_sync(jobs.stop_own_process, path)
        assert_full_capacity(manager, tmp_path)


def test_a_stopped_worker_is_still_killed_when_its_lease_expires(tmp_path: Path) -> None:
    with running(lease_grace_seconds=0) as manager:
        with (
            manager.lease_sync(lease_seconds=1) as lease,
            pytest.raises(LeaseExpiredError, match="was revoked"),
        ):
            lease.run_sync(jobs.stop_own_process, tmp_path / "stopped")
        assert_full_capacity(manager, tmp_path)


def test_a_stopped_worker_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    with running() as manager, ThreadPoolExecutor(1) as threads:
        call = threads.submit(manager.run_sync, jobs.stop_own_process, path)
        wait_until(path.exists)
        (worker,) = [identify(pid) for pid in worker_pids()]
        manager.stop_sync(grace=0.2)
        with pytest.raises(LeasePoolNotStartedError, match="its worker was killed"):
            call.result(20)
        wait_gone([worker], timeout=1)


def test_too_little_memory_is_the_calls_error_and_the_worker_lives_on(tmp_path: Path) -> None:
    """With RLIMIT_AS set by an initializer."""
    with running(initializer=jobs.limit_memory, initargs=(1 << 30,)) as manager:
        pid = manager.run_sync(os.getpid)
        with pytest.raises(MemoryError):
            manager.run_sync(jobs.eat_memory, 1 << 31)
        assert manager.run_sync(os.getpid) == pid


@callers
def test_endless_recursion_is_the_calls_error(caller: Caller) -> None:
    """With a traceback of bearable length; the worker lives on."""
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.recurse)
        assert type(error) is RecursionError
        assert caller(manager, os.getpid) == pid


@callers
@pytest.mark.parametrize("status", [3, None, "text"])
def test_sys_exit_is_the_calls_error_and_the_worker_lives_on(caller: Caller, status: Any) -> None:
    """It would end the caller's loop if it came as itself."""
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.sys_exit, status)
        assert type(error) is RemoteError
        assert error.type_name == "SystemExit"
        assert "sys_exit" in (error.traceback_text or "")
        assert caller(manager, os.getpid) == pid


# -- hostile functions -----------------------------------------------------------------------------


@callers
@pytest.mark.parametrize("job", [jobs.close_everything, jobs.close_everything_and_linger])
def test_a_function_that_closes_every_descriptor_loses_its_worker(
    caller: Caller, job: Any, tmp_path: Path
) -> None:
    """Whether it returns or lives on; the error says what it did."""
    arguments = [tmp_path / "lingering"] if job is jobs.close_everything_and_linger else []
    with running() as manager:
        error = caller.outcome(manager, job, *arguments)
        assert type(error) is WorkerCrashedError
        assert "had closed its connection to this process" in str(error)
        assert_full_capacity(manager, tmp_path)


@callers
def test_nothing_is_written_into_a_file_that_took_the_sockets_number(
    caller: Caller, tmp_path: Path
) -> None:
    """Frames are sent to sockets only."""
    path = tmp_path / "file"
    with running() as manager:
        assert type(caller.outcome(manager, jobs.close_everything_and_write, path)) is (
            WorkerCrashedError
        )
        assert path.read_bytes() == b""
        assert_full_capacity(manager, tmp_path)


@callers
def test_rubbish_on_the_socket_costs_the_worker_and_not_the_server(
    caller: Caller, tmp_path: Path
) -> None:
    """Nothing of it is unpickled."""
    with running() as manager:
        error = caller.outcome(manager, jobs.write_into_own_socket)
        assert type(error) is WorkerCrashedError
        assert "something wrote into its connection" in str(error)
        assert_full_capacity(manager, tmp_path)


@callers
@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        (jobs.change_directory, ["/"]),
        (jobs.change_signal_handlers, []),
        (jobs.leave_thread, []),
        (jobs.replace_streams, []),
        (jobs.replace_streams_badly, []),
        (jobs.read_stdin, []),
        (jobs.start_sleep, []),
        (jobs.leave_group, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_function_changes_hurts_nobody_else(
    caller: Caller, job: Any, arguments: list[Any], tmp_path: Path
) -> None:
    """Its worker serves the next call, can be killed, and leaves nothing when the manager stops."""
    with running(2) as manager:
        outcome = caller.outcome(manager, job, *arguments)
        assert not isinstance(outcome, BaseException), outcome
        assert_full_capacity(manager, tmp_path)
        with pytest.raises(CallTimeoutError):
            manager.options(call_timeout=0.3).run_sync(jobs.spin)
        assert_full_capacity(manager, tmp_path)


@callers
@pytest.mark.parametrize("job", [jobs.fork_and_return, jobs.fork_and_raise])
def test_a_child_that_comes_back_from_a_function_does_not_answer(
    caller: Caller, job: Any, tmp_path: Path
) -> None:
    """The call has one outcome, the worker's; the child is gone."""
    path = tmp_path / "child"
    with running() as manager:
        pid = caller(manager, os.getpid)
        assert caller(manager, job, path) == pid
        wait_until(path.exists, message="no child came back")
        assert caller(manager, os.getpid) == pid


@callers
def test_a_process_that_keeps_the_workers_socket_hides_no_crash(
    caller: Caller, tmp_path: Path
) -> None:
    """The end of the worker's process counts, not that of its socket."""
    path = tmp_path / "keeper"
    with running() as manager:
        error = caller.outcome(manager, jobs.pass_socket_on_and_die, path)
        assert type(error) is WorkerCrashedError
        assert error.exitcode == 3
        assert_full_capacity(manager, tmp_path)


# -- bounds ----------------------------------------------------------------------------------------


def test_there_are_never_more_workers_than_configured(tmp_path: Path) -> None:
    """Sampled while workers are killed, time out, are recycled, and have their leases revoked."""

    async def harm(manager: LeasedExecutorManager) -> int:
        most = 0
        done = asyncio.Event()

        async def sample() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, len(worker_pids()))
                await asyncio.sleep(0)

        async def call(number: int) -> None:
            if number % 4 == 0:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await manager.run(jobs.spin)
            elif number % 4 == 1:
                with pytest.raises(WorkerCrashedError):
                    await manager.run(jobs.exit_at_once)
            elif number % 4 == 2:
                with pytest.raises(LeaseExpiredError):
                    async with manager.lease(lease_seconds=0.05) as lease:
                        await asyncio.gather(lease.run(jobs.spin), lease.run(jobs.spin))
            else:
                assert await manager.run(jobs.echo, number) == number

        sampler = asyncio.create_task(sample())
        await asyncio.gather(*(call(number) for number in range(30)))
        done.set()
        await sampler
        return most

    with running(2, max_tasks_per_child=1, lease_grace_seconds=0) as manager:
        assert asyncio.run(harm(manager)) <= 2
        assert manager.stats().leases_expired > 5
        assert_full_capacity(manager, tmp_path)


def test_what_a_successful_call_had_started_ends_with_its_worker() -> None:
    """And not before."""
    with running() as manager:
        worker, *started = [identify(pid) for pid in manager.run_sync(jobs.start_and_return)]
        assert manager.run_sync(jobs.echo, 1) == 1
        os.kill(worker.pid, signal.SIGKILL)
        wait_gone(started, timeout=5)
