"""The fork server runs out of descriptors: workers start later, and what runs goes on."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from leasepool_django import CallTimeoutError, LeasedExecutorManager, WorkerCrashedError
from tests import process_jobs as jobs
from tests.process_pools import assert_full_capacity, running, wait_all_idle
from tests.process_table import fork_servers, identify, is_alive, wait_gone, worker_pids
from tests.waiting import wait_until

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])


@contextmanager
def descriptors_left(pid: int, count: int) -> Iterator[None]:
    """Let a process open ``count`` more descriptors, and no more."""
    used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    free = [number for number in range(256) if number not in used]
    _, hard = before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def worker_killed(manager: LeasedExecutorManager) -> None:
    with pytest.raises(WorkerCrashedError):
        manager.run_sync(jobs.kill_own_process)


@pytest.mark.parametrize(
    ("method", "count", "why"),
    [
        ("forkserver", 0, "the fork server has run out of file descriptors"),
        ("spawn", 0, "the fork server has run out of file descriptors"),
        ("spawn", 1, "[Errno 24] "),
    ],
)
def test_without_descriptors_in_the_fork_server_workers_are_started_later(
    method: str, count: int, why: str, tmp_path: Path
) -> None:
    """The sibling goes on meanwhile; the fork server is not replaced."""
    with running(2, mp_context=method) as manager:
        (server,) = fork_servers()
        with descriptors_left(server, count):
            worker_killed(manager)
            wait_until(lambda: manager.stats().start_failures >= 2)
            assert manager.run_sync(jobs.echo, "the sibling") == "the sibling"
            error = manager.stats().last_start_error or ""
            assert error.startswith(f"A worker could not be started: {why}")
        assert_full_capacity(manager, tmp_path)
        assert fork_servers() == [server]
        assert manager.stats().last_start_error is None


def test_what_a_worker_left_behind_is_killed_when_it_can_be_looked_for(tmp_path: Path) -> None:
    """Its end is told at once; what is in sessions of its own follows within a second or so."""
    with running() as manager:
        (server,) = fork_servers()
        worker, *started = map(identify, manager.run_sync(jobs.start_and_return))
        with descriptors_left(server, 0):
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: manager.stats().start_failures >= 1)
            assert any(map(is_alive, started))
        wait_gone(started, timeout=5)
        assert_full_capacity(manager, tmp_path)
        assert fork_servers() == [server]


# Leaves no number free between others, which would be of no use to a process at its limit.
FILLED = """
import os, signal

def fill(*_):
    while os.open(os.devnull, os.O_RDONLY) < 40:
        pass

signal.signal(signal.SIGUSR1, fill)
"""


def test_strays_die_with_the_fork_server_though_it_has_no_descriptor_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "filled.py").write_text(FILLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    with running(preload=["filled"]) as manager:
        (server,) = fork_servers()
        started = [identify(pid) for pid in manager.run_sync(jobs.start_and_return)]
        os.kill(server, signal.SIGUSR1)
        wait_until(Path(f"/proc/{server}/fd/40").exists)
        with descriptors_left(server, 0):
            manager.stop_sync()
        wait_gone(started, timeout=5)
        assert len(started) == 6


@each_method
def test_without_descriptors_here_workers_are_killed_by_the_fork_server(
    method: str, tmp_path: Path
) -> None:
    """None is left to receive the worker's with; it is started and can be killed all the same."""
    with running(mp_context=method) as manager:
        worker = identify(manager.run_sync(os.getpid))
        free = 2  # for the socket pair of the next worker, and not for its process
        with descriptors_left(os.getpid(), free):
            os.kill(worker.pid, signal.SIGKILL)
            wait_gone_without_looking(manager)
        assert manager.run_sync(jobs.echo, 1) == 1
        with pytest.raises(CallTimeoutError):
            manager.options(call_timeout=0.3).run_sync(jobs.spin)
        assert_full_capacity(manager, tmp_path)
        wait_gone([worker], timeout=1)
        assert len(worker_pids()) == 1


def wait_gone_without_looking(manager: LeasedExecutorManager) -> None:
    """Wait until a worker was replaced; looking into ``/proc`` would need a descriptor."""
    wait_until(lambda: manager.stats().workers_started >= 2, timeout=20)


# Lets the fork server, and so its workers, be an ordinary user who may become root again.
DEMOTED = """
import os
os.setresuid(54321, 54321, 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a program that it cannot kill")
def test_a_program_of_another_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that ``sudo`` has started: it costs no worker, and not the fork server."""
    (tmp_path / "demoted.py").write_text(DEMOTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    with running(2, preload=["tests.process_jobs", "demoted"]) as manager:
        (server,) = fork_servers()
        pid, program = manager.run_sync(jobs.start_as_root)
        stray = identify(program)
        try:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: manager.stats().workers_crashed == 1)
            wait_all_idle(manager)
            assert fork_servers() == [server]
            assert is_alive(stray)
        finally:
            os.kill(program, signal.SIGKILL)
        wait_gone([stray], timeout=5)
        # Others' are killed as ever.
        started = [identify(number) for number in manager.run_sync(jobs.start_and_return)]
        os.kill(started[0].pid, signal.SIGKILL)
        wait_gone(started, timeout=5)
