"""Signal handlers that raise at any moment, timers that are left behind, and other damage."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from leasepool_django import RemoteError, WorkerCrashedError
from leasepool_django.backends.process import wire, worker
from tests import process_jobs, signal_jobs
from tests.process_pools import CALLERS, Caller, assert_full_capacity, running
from tests.process_table import state
from tests.waiting import wait_until

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)
each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])


class Waiting(logging.Handler):
    """Keeps the texts of records; the first one is handled when ``path`` is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        wait_until(self.path.exists, timeout=20)


@contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("tests.worker")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@each_caller
def test_a_handler_that_raises_in_the_middle_of_a_record_tears_nothing(
    caller: Caller, tmp_path: Path
) -> None:
    """The function gets what was raised; the rest of the record goes ahead of all that follows."""
    handler = Waiting(tmp_path / "struck")
    with handled_by(handler), running(forward_process_logs=True) as manager:
        pid = caller(manager, os.getpid)
        assert caller(manager, signal_jobs.log_until_interrupted, handler.path, 3_000_000)
        assert caller(manager, os.getpid) == pid
    assert [text[:10] for text in handler.texts] == ["first", "x" * 10, "after"]
    assert handler.texts[1] == "x" * 3_000_000


@each_method
def test_a_timer_left_behind_hits_no_other_call(method: str) -> None:
    with running(mp_context=method) as manager:
        pid = manager.run_sync(signal_jobs.set_timers)
        assert manager.run_sync(signal_jobs.timers) == [False, False, False]
        with pytest.raises(ValueError, match="with timers"):
            manager.run_sync(signal_jobs.set_timers_and_raise)
        assert manager.run_sync(signal_jobs.timers) == [False, False, False]
        assert manager.run_sync(signal_jobs.set_alarm) == pid
        assert manager.run_sync(signal_jobs.timers) == [False, False, False]
        assert manager.run_sync(signal.setitimer, signal.ITIMER_REAL, 1000) == (0, 0)
        assert manager.run_sync(signal_jobs.timers) == [False, False, False]
        assert manager.run_sync(os.getpid) == pid


def test_timers_of_an_initializer_go_on() -> None:
    """Such as those of a profiler."""
    with running(initializer=signal_jobs.set_timers) as manager:
        for _ in range(3):
            assert manager.run_sync(signal_jobs.timers) == [True, True, True]


def test_a_handler_left_behind_that_raises_between_calls_costs_no_call(tmp_path: Path) -> None:
    with running() as manager:
        manager.run_sync(signal_jobs.leave_raising_handler)
        os.kill(manager.run_sync(os.getpid), signal.SIGUSR1)
        wait_until(lambda: manager.stats().workers_crashed == 1)
        assert manager.run_sync(process_jobs.echo, 1) == 1
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_a_worker_that_fails_outside_of_its_function_has_a_status_of_its_own(
    caller: Caller, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is not taken for one that was ended on purpose; what failed is on standard error."""
    with running() as manager:
        error = caller.outcome(manager, signal_jobs.damage_worker)
        assert isinstance(error, WorkerCrashedError)
        assert error.exitcode == wire.BROKEN
        assert_full_capacity(manager, tmp_path)
    assert "TypeError: 'NoneType' object is not callable" in capfd.readouterr().err


@each_caller
def test_a_worker_whose_socket_was_shut_down_says_so(caller: Caller, tmp_path: Path) -> None:
    with running() as manager:
        error = caller.outcome(manager, signal_jobs.shut_own_socket)
        assert isinstance(error, WorkerCrashedError)
        assert "had closed its connection to this process" in str(error)
        assert_full_capacity(manager, tmp_path)


@each_method
def test_a_function_that_forgets_all_modules_still_says_how_it_failed(
    method: str, tmp_path: Path
) -> None:
    with running(mp_context=method) as manager:
        # As itself where pickle does without modules (Python 3.13); else RemoteError stands for it.
        with pytest.raises((RemoteError, ValueError), match="without modules") as caught:
            manager.run_sync(signal_jobs.clear_modules)
        assert "ValueError" in (type(caught.value).__name__, getattr(caught.value, "type_name", ""))
        # Its worker could import nothing, and is replaced.
        assert manager.stats().workers_crashed == 0
        assert_full_capacity(manager, tmp_path)


def dead_children(pid: int) -> int:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sum(state(int(child)) == "Z" for child in listing.split())


def test_dead_children_of_functions_do_not_pile_up() -> None:
    """A worker adopts what its functions' programs leave behind; it is replaced in time."""
    with running() as manager:
        most = 0
        pids = set()
        for _ in range(100):
            pids.add(pid := manager.run_sync(signal_jobs.leave_orphans, 5))
            with suppress(FileNotFoundError):
                most = max(most, dead_children(pid))
        assert 1 < len(pids) < 10
        assert most <= worker.MOST_DEAD_CHILDREN + 5 * worker.CALLS_BETWEEN_LOOKS
        assert manager.stats().workers_crashed == 0


def test_the_status_of_a_program_is_left_to_the_function_that_started_it() -> None:
    with running() as manager:
        count = worker.MOST_DEAD_CHILDREN
        pid, *programs = manager.run_sync(signal_jobs.leave_running_programs, count)
        wait_until(lambda: dead_children(pid) == count)
        for _ in range(3 * worker.CALLS_BETWEEN_LOOKS):
            assert manager.run_sync(os.getpid) == pid
        assert manager.run_sync(signal_jobs.statuses) == list(range(count))
        assert len(programs) == count


def test_a_fork_leaves_blocked_signals_blocked() -> None:
    with running() as manager:
        assert manager.run_sync(signal_jobs.blocked_after_fork) == (True, True)


def test_a_forked_child_keeps_its_own_signal_handlers_when_it_forks() -> None:
    """It loses those of the worker only."""
    with running() as manager:
        assert manager.run_sync(signal_jobs.handlers_in_grandchild)
