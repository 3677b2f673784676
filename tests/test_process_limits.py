"""Descriptors or processes run out: workers start later, and what runs goes on."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeasedExecutorManager,
    LeaseTimeoutError,
    WorkerCrashedError,
)
from tests import process_jobs as jobs
from tests.process_pools import assert_full_capacity, run_program, running, wait_all_idle
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
        ("forkserver", 3, "the fork server has run out of file descriptors"),
        ("spawn", 4, "[Errno 24] "),
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


EXHAUSTED = """
    import os
    import resource
    import signal
    import sys

    from leasepool_django import LeasedExecutorManager, LeaseTimeoutError
    from tests import process_jobs as jobs
    from tests.process_table import fork_servers, identify, wait_gone
    from tests.waiting import wait_until

    if __name__ == "__main__":
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        victim = fork_servers()[0] if sys.argv[1] == "server" else manager.run_sync(os.getpid)
        child = identify(manager.run_sync(jobs.start_sleep, own_session=True))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        # What is open stays open, and nothing more can be opened.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: manager.stats().start_failures)
        try:
            manager.options(timeout=1).run_sync(jobs.echo, 1)
        except LeaseTimeoutError as error:
            print(error)
        stats = manager.stats()
        print(stats.start_failures > 1, stats.live_workers, stats.last_start_error)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        print(manager.options(timeout=20).run_sync(jobs.echo, "recovered"))
        print(manager.stats().last_start_error)
        wait_gone([child], timeout=5)
        manager.stop_sync()
"""


@pytest.mark.parametrize(
    ("victim", "what"), [("worker", "A worker"), ("server", "The fork server")]
)
def test_without_descriptors_workers_are_started_later(
    victim: str, what: str, tmp_path: Path
) -> None:
    ended = run_program(tmp_path, EXHAUSTED, victim)
    assert ended.returncode == 0, ended.stderr
    why = f"{what} could not be started: [Errno 24] Too many open files."
    told, stats, *rest = ended.stdout.splitlines()
    assert told == (
        "No lease of 1 worker(s) of 'leasepool' came within 1 s; 0 other caller(s) wait. Workers "
        f"cannot be started: {why}"
    )
    assert stats == f"True 0 {why}"
    assert rest == ["recovered", "None"]


# What the answers to these need is loaded by then: in this state nothing can be.
STARVED = """
    import logging
    import resource
    import sys
    import threading

    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs

    def outcome(call, *arguments):
        try:
            return call.run_sync(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def say(text):
        # In one piece: print() lets a record of another thread come before the end of the line.
        sys.stdout.write(f"{text}\\n")

    if __name__ == "__main__":
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="logged: %(message)s")
        manager = LeasedExecutorManager(
            max_pools=1, workers_per_pool=1, forward_process_logs=True, mp_context=sys.argv[1]
        )
        manager.start_sync()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        outcome(manager, jobs.log, "a record")
        say(outcome(manager, jobs.raise_group))
        say(outcome(manager, jobs.echo, threading.Lock()))
        say(outcome(manager, jobs.return_nested_lock))
        say(outcome(manager, jobs.return_exploding))
        say(outcome(manager, len, bytes(200_000)))
        say(manager.describe())
        say(outcome(manager.options(call_timeout=0.1), jobs.spin))
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        say(outcome(manager.options(timeout=20), jobs.echo, "recovered"))
        manager.stop_sync()
"""


A_LOCK = "A lock works in one process only: leave it out, or make it in the worker."


@each_method
def test_without_descriptors_every_answer_arrives(method: str, tmp_path: Path) -> None:
    ended = run_program(tmp_path, STARVED, method)
    assert ended.returncode == 0, ended.stderr
    here = "tests.process_jobs"
    answers = ended.stdout.splitlines()
    assert [line for line in answers if not line.startswith("logged: leasepool:")] == [
        "logged: a record",
        "ExceptionGroup: several (2 sub-exceptions)",
        (
            f"NotPicklableError: The arguments of {here}.echo cannot be sent to a worker: args[0]: "
            f"_thread.lock. {A_LOCK}"
        ),
        (
            f"NotPicklableError: The result of {here}.return_nested_lock cannot be sent back from "
            f"the worker: result['client'].lock: _thread.lock. {A_LOCK}"
        ),
        (
            f"NotPicklableError: The result of {here}.return_exploding cannot be unpickled here: "
            "ValueError: on arrival"
        ),
        "200000",
        (
            "leasepool (process, running): 1 of 1 pools, 1 idle and 0 busy workers, 0 leases, 0 "
            "waiting"
        ),
        f"CallTimeoutError: {here}.spin ran longer than its call_timeout of 0.1 s and was stopped.",
        "recovered",
    ]


# Gives up what lets root pass the limit: the kernel counts the processes of the real user, and
# spares those with certain capabilities. Before each fork it looks whether there is a limit.
LIMITED = """
import ctypes
import os
import pathlib
import resource

if os.geteuid() == 0:
    os.setresuid({user}, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for capability in (21, 24):  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
        sets[0] &= ~(1 << capability)
        sets[1] &= ~(1 << capability)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())

soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)


def limit():
    limited = pathlib.Path({path!r}).exists()
    resource.setrlimit(resource.RLIMIT_NPROC, (1 if limited else soft, hard))


os.register_at_fork(before=limit)
"""


def test_without_processes_workers_are_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on a user's processes, as a container or a service manager sets it."""
    limited = tmp_path / "limited"
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "limited_processes.py").write_text(
        LIMITED.format(user=50_000 + os.getpid() % 10_000, path=str(limited))
    )
    with running(preload=["limited_processes"]) as manager:
        limited.touch()
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.kill_own_process)
        with pytest.raises(LeaseTimeoutError) as caught:
            manager.options(timeout=0.5).run_sync(jobs.echo, 1)
        why = "A worker could not be started: [Errno 11] Resource temporarily unavailable."
        assert str(caught.value).endswith(f"Workers cannot be started: {why}")
        stats = manager.stats()
        assert stats.last_start_error == why
        assert stats.start_failures > 1
        assert stats.live_workers == 0
        limited.unlink()
        assert manager.options(timeout=20).run_sync(jobs.echo, "recovered") == "recovered"
        assert manager.stats().last_start_error is None
        assert_full_capacity(manager, tmp_path)
