"""What does not start: workers that fail or die later on, a fork server that cannot be booted."""

from __future__ import annotations

import errno
import logging
import multiprocessing.spawn
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leasepool_django import (
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    LeaseTimeoutError,
    WorkerCrashedError,
)
from leasepool_django.backends.process import control, pool
from leasepool_django.engine import Event
from tests import process_jobs as jobs
from tests.process_pools import CALLERS, Caller, failed_start, running
from tests.waiting import wait_until


def worker_state(manager: LeasedExecutorManager) -> str:
    return manager.stats().pools[0].workers[0].state


def states_until_idle(manager: LeasedExecutorManager) -> set[str]:
    """Return what the only worker's place was like until the worker was ready again."""
    seen = set()

    def is_idle() -> bool:
        state = worker_state(manager)
        seen.add(state)
        return state == "idle"

    wait_until(is_idle)
    return seen


# --- workers -----------------------------------------------------------------------------------


def test_a_later_failure_is_visible_and_is_tried_again(tmp_path: Path) -> None:
    """Callers who wait meanwhile are told why, and are served as soon as a worker starts."""
    obstacle = tmp_path / "obstacle"
    events: list[Event] = []
    with running(initializer=jobs.initialize_until, initargs=[obstacle]) as manager:
        manager.subscribe(events.append)
        obstacle.touch()
        with pytest.raises(Exception, match="SIGKILL"):
            manager.run_sync(jobs.kill_own_process)
        with pytest.raises(
            LeaseTimeoutError, match="Workers cannot be started: A worker could not get ready"
        ):
            manager.options(timeout=1).run_sync(os.getpid)
        stats = manager.stats()
        assert stats.start_failures >= 1
        assert "obstacle is still there" in (stats.last_start_error or "")
        assert worker_state(manager) == "failed"
        obstacle.unlink()
        assert manager.options(timeout=20).run_sync(jobs.echo, 1) == 1
        assert manager.stats().last_start_error is None
    delays = [event.facts["retry_in"] for event in events if event.kind == "worker_start_failed"]
    # No crash loop: each wait is twice as long as the one before.
    assert delays == [0.1 * 2**number for number in range(len(delays))]


def test_workers_that_die_as_soon_as_they_are_ready_do_not_come_in_a_loop() -> None:
    """The first is replaced after 0.1 s, the next ones after 0.2, 0.4 and 0.8."""
    began = time.monotonic()
    with running(initializer=jobs.die_soon) as manager:
        wait_until(lambda: manager.stats().workers_crashed >= 4, timeout=20)
        assert time.monotonic() - began > 0.1 + 0.2 + 0.4
        wait_until(lambda: worker_state(manager) == "failed")


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)
def test_workers_that_die_before_they_read_a_call_do_not_come_in_a_loop(caller: Caller) -> None:
    """Each is counted and told of as a crash, and the next one waited for twice as long."""
    events: list[Event] = []
    with ThreadPoolExecutor(1) as thread:
        with running(initializer=jobs.die_when_a_call_comes) as manager:
            manager.subscribe(events.append)
            began = time.monotonic()
            call = thread.submit(caller.outcome, manager, jobs.echo, 1)
            wait_until(lambda: manager.stats().workers_crashed >= 4, timeout=20)
            assert time.monotonic() - began > 0.1 + 0.2 + 0.4
            wait_until(lambda: worker_state(manager) == "failed")
            assert manager.stats().waiting == 1
        assert type(call.result(10)) is LeasePoolNotStartedError
    crashes = [event for event in events if event.kind == "worker_crashed"]
    assert len(crashes) >= 4
    assert {(event.level, event.facts["calls"]) for event in crashes} == {(logging.WARNING, 0)}


def test_a_worker_that_dies_in_its_first_call_is_replaced_at_once() -> None:
    with running() as manager:
        for _ in range(5):
            with pytest.raises(WorkerCrashedError):
                manager.run_sync(jobs.kill_own_process)
            assert "failed" not in states_until_idle(manager)


# --- the fork server --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "more than a socket takes"])
def test_an_interpreter_that_cannot_be_booted_fails_the_start_at_once(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever there is to be sent to it."""
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nexit 3\n")
    interpreter.chmod(0o700)
    monkeypatch.setattr(multiprocessing.spawn, "get_executable", lambda: str(interpreter))
    began = time.monotonic()
    error = failed_start(initializer=jobs.initialize, initargs=[bytes(size)])
    assert re.fullmatch(r"The fork server \(pid \d+\) exited with status 3\.", str(error))
    assert time.monotonic() - began < control.SEND_SECONDS / 2


def test_an_interpreter_that_is_missing_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "python"
    monkeypatch.setattr(multiprocessing.spawn, "get_executable", lambda: str(missing))
    assert str(failed_start()) == (
        f"The fork server could not be started: [Errno 2] No such file or directory: '{missing}'."
    )


def test_a_start_that_fails_at_its_first_worker_starts_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check for what a test leaves behind looks for another fork server."""
    asked = []

    def fail(*_: object) -> None:
        asked.append(1)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pool, "ProcessWorker", fail)
    error = failed_start()
    assert str(error) == "A worker could not be started: [Errno 24] Too many open files."
    assert asked == [1]
