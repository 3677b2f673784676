"""Managers with the process backend for tests, ways of calling them, and programs of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from leasepool_django import LeasedExecutorManager, LeasePoolNotStartedError, WorkerStartError
from leasepool_django.backends.process.driver import ProcessWorker
from tests import process_jobs as jobs
from tests.conftest import HAS_UVLOOP
from tests.waiting import wait_until

__all__ = [
    "ALL_WARNINGS",
    "BLOCKING",
    "CALLERS",
    "ROOT",
    "Caller",
    "assert_full_capacity",
    "failed_start",
    "new_manager",
    "run_program",
    "running",
    "start_program",
    "workers_of",
]

ROOT = Path(__file__).parents[1]
# For programs whose whole output matters: in development mode asyncio also reports steps that
# take long, as they do on a busy machine.
ALL_WARNINGS = {"PYTHONDEVMODE": "", "PYTHONWARNINGS": "default"}
# Seconds after which a call that nobody answers is taken for a hang.
HANG = 30.0

Job: TypeAlias = Sequence[Any]
"""A function and its positional arguments."""


def new_manager(workers: int = 1, **options: Any) -> LeasedExecutorManager:
    """Make a manager of one pool of ``workers`` workers, not started."""
    options.setdefault("max_pools", 1)
    return LeasedExecutorManager(workers_per_pool=workers, **options)


@contextmanager
def running(workers: int = 1, **options: Any) -> Iterator[LeasedExecutorManager]:
    """Give a started manager with all of its workers ready, and stop it afterwards."""
    manager = new_manager(workers, **options)
    manager.start_sync()
    try:
        wait_all_idle(manager)
        yield manager
    finally:
        manager.stop_sync(grace=0)


def failed_start(**options: Any) -> WorkerStartError:
    """Start a manager of two workers that cannot be started; return the error."""
    manager = new_manager(2, name_prefix="failing", **options)
    with pytest.raises(WorkerStartError) as caught:
        manager.start_sync()
    assert manager.stats().state == "stopped"
    assert manager.total_count == 0
    with pytest.raises(LeasePoolNotStartedError):
        manager.run_sync(os.getpid)
    # As after any other end, stop() has nothing to do, and the next start() fails in the same way.
    manager.stop_sync()
    return caught.value


def wait_all_idle(manager: LeasedExecutorManager, *, timeout: float = 15.0) -> None:
    """Wait until every worker of every pool is ready and free."""
    wait_until(
        lambda: manager.stats().idle_workers == manager.total_count * manager.workers_per_pool,
        timeout=timeout,
        message=lambda: f"workers are missing: {manager.stats()}",
    )


def assert_full_capacity(manager: LeasedExecutorManager, folder: Path) -> None:
    """Hold that all workers of one pool come back and run calls at the same time."""
    wait_all_idle(manager)
    meeting = folder / f"meeting-{os.urandom(4).hex()}"
    meeting.mkdir()
    with manager.lease_sync(timeout=15) as lease:
        count = lease.workers
        met = list(lease.executor.map(jobs.meet, [meeting] * count, [count] * count))
    assert len(set(met)) == count


def _outcomes_on(new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> Any:
    def outcomes(manager: LeasedExecutorManager, calls: Sequence[Job]) -> list[Any]:
        async def together() -> list[Any]:
            async with asyncio.timeout(HANG):
                return await asyncio.gather(
                    *(manager.run(*call) for call in calls), return_exceptions=True
                )

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(together())

    return outcomes


def _blocking_outcomes(manager: LeasedExecutorManager, calls: Sequence[Job]) -> list[Any]:
    def outcome(call: Job) -> Any:
        try:
            return manager.run_sync(*call)
        except Exception as error:  # noqa: BLE001 - it is what the caller got
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(HANG) for future in [threads.submit(outcome, c) for c in calls]]


@dataclass(frozen=True)
class Caller:
    """One way of driving a worker: a kind of event loop, or blocking threads."""

    name: str
    outcomes: Callable[[LeasedExecutorManager, Sequence[Job]], list[Any]]
    """Runs calls at the same time; gives each one's result or error, in order."""

    def outcome(self, manager: LeasedExecutorManager, *call: Any) -> Any:
        """Run one call; give its result or its error."""
        (outcome,) = self.outcomes(manager, [call])
        return outcome

    def __call__(self, manager: LeasedExecutorManager, *call: Any) -> Any:
        """Run one call; return its result or raise its error."""
        outcome = self.outcome(manager, *call)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _uvloop_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


BLOCKING = Caller("blocking", _blocking_outcomes)
CALLERS = [Caller("asyncio", _outcomes_on(asyncio.SelectorEventLoop)), BLOCKING]
if HAS_UVLOOP:
    CALLERS.append(Caller("uvloop", _outcomes_on(_uvloop_loop)))


def start_program(
    folder: Path,
    text: str,
    *arguments: object,
    interpreter: Sequence[str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Run ``text`` as a script of its own in ``folder``; its output is captured.

    ``interpreter``: arguments of the interpreter; with ``-c`` or ``-m`` there is no script. The
    package and the tests can be imported. ``options``: those of ``Popen``, with ``env`` added to
    this process's environment.
    """
    command = [sys.executable, *(interpreter or [])]
    if not {"-c", "-m"} & set(command):
        script = folder / "program.py"
        script.write_text(textwrap.dedent(text))
        command.append(str(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=options.pop("cwd", folder),
        **options,
    )


def run_program(
    folder: Path, text: str, *arguments: object, timeout: float = 60.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Do as ``start_program`` and wait, at most ``timeout`` seconds, for its end."""
    with start_program(folder, text, *arguments, **options) as program:
        try:
            out, err = program.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            program.kill()
            try:
                out, err = program.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                out, err = "", "What it has left behind holds its output open."
            raise AssertionError(f"the program hangs.\n{out}\n{err}") from None
    # In development mode asyncio reports steps that took long, which says something of the machine.
    err = "".join(line for line in err.splitlines(True) if not line.startswith("Executing <"))
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


def workers_of(manager: LeasedExecutorManager) -> list[ProcessWorker]:
    """Give the workers of all pools, which must be there."""
    found: list[ProcessWorker] = []
    for pool in manager._supervisor.dispatcher.line.pools:
        for slot in pool.slots:
            assert isinstance(slot.worker, ProcessWorker)
            found.append(slot.worker)
    return found
