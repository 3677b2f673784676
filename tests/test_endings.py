"""A manager is stopped, or its process ends, in the middle of everything: nothing is left."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

import pytest

from leasepool_django import LeasePoolNotStartedError
from leasepool_django.backends.process.driver import ProcessWorker
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import (
    ALL_WARNINGS,
    ROOT,
    assert_full_capacity,
    new_manager,
    run_program,
    running,
)
from tests.process_table import fork_servers, state
from tests.waiting import async_wait_until, wait_until


def test_a_stop_may_be_asked_for_in_a_signal_handler_while_every_lock_is_held(
    tmp_path: Path,
) -> None:
    """The handler runs on the very thread that holds them: one ``acquire`` would be the end."""
    with running(2) as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(manager.run_sync, jobs.hold, tmp_path)
        wait_until((tmp_path / "holding").exists)
        supervisor, dispatcher = manager._supervisor, manager._dispatcher
        slots = [slot for pool in dispatcher.line.pools for slot in pool.slots]
        handled: list[int] = []

        def handler(number: int, _: object) -> None:
            manager.request_stop()
            handled.append(number)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with ExitStack() as locks:
                locks.enter_context(dispatcher.lock)
                locks.enter_context(supervisor._life)
                for slot in slots:
                    assert isinstance(slot.worker, ProcessWorker)
                    locks.enter_context(slot.worker._lock)
                signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert handled == [signal.SIGUSR1]
        wait_until(lambda: manager.stats().state == "stopping")
        with pytest.raises(LeasePoolNotStartedError, match="'leasepool' is stopping"):
            manager.run_sync(jobs.echo, 1)
        (tmp_path / "go").touch()
        assert call.result(10) > 0
        wait_until(lambda: manager.stats().state == "stopped")


def test_what_it_says_of_itself_holds_for_callers_at_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who is served can read "running", and who is refused "stopping"."""
    manager = new_manager()
    dispatcher = manager._supervisor.dispatcher
    found: set[tuple[str, bool]] = set()

    class Lock:
        """The dispatcher's, with a look at both before each use: whoever changes one uses it."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            found.add((manager._supervisor._state, dispatcher.closed is None))
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    dispatcher.lock = cast("threading.Lock", Lock(dispatcher.lock))
    told: list[str] = []
    refuse = dispatcher._refuse

    def watched(*arguments: Any) -> None:
        told.append(manager._supervisor._state)
        refuse(*arguments)

    monkeypatch.setattr(dispatcher, "_refuse", watched)
    manager.start_sync()
    assert manager.run_sync(jobs.echo, 3) == 3
    manager.stop_sync()
    assert {("starting", False), ("running", True), ("draining", False)} <= found
    assert not {("running", False), ("draining", True)} & found
    assert told == ["draining"]


def test_a_stop_while_workers_start_ends_the_start(tmp_path: Path, loop_runner: LoopRunner) -> None:
    manager = new_manager(2, initializer=jobs.initialize_for_ever, initargs=[tmp_path])

    async def start_and_stop() -> None:
        start = asyncio.create_task(manager.start())
        await async_wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        began = time.monotonic()
        await manager.stop()
        assert time.monotonic() - began < 5
        with pytest.raises(LeasePoolNotStartedError) as caught:
            await start
        assert str(caught.value) == "The manager 'leasepool' was stopped while it started."

    loop_runner(start_and_stop())
    assert not manager.started


def test_a_manager_is_stopped_from_several_loops_and_threads_at_once(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    with running(2) as manager, ThreadPoolExecutor(3) as threads:
        call = threads.submit(manager.run_sync, jobs.hold, tmp_path)
        wait_until((tmp_path / "holding").exists)

        def stop() -> None:
            loop_runner(manager.stop(grace=0.2))

        stops = [threads.submit(stop), threads.submit(manager.stop_sync, grace=0.1)]
        with pytest.raises(LeasePoolNotStartedError) as caught:
            call.result(10)
        assert str(caught.value) == (
            "The manager 'leasepool' was stopped before this call had ended; its worker was "
            "killed. A longer shutdown grace gives calls more time."
        )
        for stopped in stops:
            stopped.result(10)
        loop_runner(manager.stop())
        assert not fork_servers()
        manager.start_sync()
        assert_full_capacity(manager, tmp_path)


def test_who_gives_calls_no_time_is_not_told_to_give_them_more(tmp_path: Path) -> None:
    with running() as manager, ThreadPoolExecutor(1) as thread:
        call = thread.submit(manager.run_sync, jobs.hold, tmp_path)
        wait_until((tmp_path / "holding").exists)
        manager.request_stop(grace=30)
        manager.stop_sync(grace=0)
        with pytest.raises(LeasePoolNotStartedError) as caught:
            call.result(10)
    assert str(caught.value) == (
        "The manager 'leasepool' was stopped before this call had ended; its worker was killed."
    )


def test_a_stop_in_a_cancelled_task_is_carried_through(
    tmp_path: Path, loop_runner: LoopRunner
) -> None:
    """As in the ``finally`` of a lifespan whose server gives up on it."""
    manager = new_manager()

    async def lifespan() -> None:
        await manager.start()
        try:
            await manager.run(jobs.hold, tmp_path)
        finally:
            await manager.stop(grace=0.1)

    async def server() -> None:
        task = asyncio.create_task(lifespan())
        await async_wait_until((tmp_path / "holding").exists)
        task.cancel()
        await async_wait_until(lambda: manager.stats().state == "stopping")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await async_wait_until(lambda: manager.stats().state == "stopped")

    loop_runner(server())


BUSY_EXIT = """
    import asyncio
    import os
    import pathlib
    import sys
    import threading

    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs
    from tests.process_table import fork_servers, worker_pids
    from tests.waiting import wait_until

    if __name__ == "__main__":
        folder = pathlib.Path(sys.argv[1])
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=4)
        manager.start_sync()

        def in_thread(target, *arguments):
            threading.Thread(target=target, args=arguments, daemon=True).start()

        async def on_loop():
            await asyncio.gather(manager.run(jobs.hold, folder, "loop"), manager.run(jobs.echo, 1))

        in_thread(manager.run_sync, jobs.hold, folder, "thread")
        in_thread(asyncio.run, on_loop())
        lease = manager.acquire_sync(workers=2)
        futures = [lease.executor.submit(jobs.spin, folder / f"executor-{n}") for n in range(2)]
        for n in range(5):
            in_thread(manager.run_sync, jobs.echo, n)
        wait_until(lambda: len(list(folder.iterdir())) == 4)
        wait_until(lambda: manager.stats().waiting)
        print(*fork_servers(), *worker_pids(), flush=True)
        if len(sys.argv) > 2:
            os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [None, signal.SIGKILL, signal.SIGTERM], ids=str)
def test_an_exit_with_everything_busy_leaves_nothing_and_says_nothing(
    number: int | None, tmp_path: Path
) -> None:
    """By its own, and by a signal that no Python code handles."""
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments: list[Any] = [folder] if number is None else [folder, int(number)]
    ended = run_program(tmp_path, BUSY_EXIT, *arguments, timeout=30)
    assert ended.returncode == (0 if number is None else -number)
    assert ended.stderr == ""
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 5
    wait_until(lambda: {state(pid) for pid in pids} <= {"", "Z", "X"}, timeout=1.0)


def test_deadlines_hold_while_the_clock_on_the_wall_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By days, forwards and back, at every look at it."""
    real, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + 86_400 * (looks if looks % 2 else -looks)

    monkeypatch.setattr(time, "time", jumping)
    with running(lease_grace_seconds=0.1) as manager, ThreadPoolExecutor(1) as thread:
        lease = manager.acquire_sync(lease_seconds=60)
        assert time.time() > real() + 1000
        for _ in range(20):
            assert lease.run_sync(jobs.echo, "in force") == "in force"
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"longer than its call_timeout of 0\.2 s"):
            lease.options(call_timeout=0.2).run_sync(jobs.hold, tmp_path)
        with pytest.raises(TimeoutError, match=r"came within 0\.2 s"):
            thread.submit(manager.options(timeout=0.2).run_sync, jobs.echo, 1).result(10)
        assert 0.4 <= time.monotonic() - began < 5
        lease.extend_sync(0.2)
        with pytest.raises(Exception, match="expired after"):
            lease.run_sync(jobs.hold, tmp_path, "again")
        assert_full_capacity(manager, tmp_path)


def test_no_deadline_is_taken_from_the_clock_on_the_wall() -> None:
    package = Path(__file__).parents[1] / "leasepool_django"
    wall_clock = re.compile(r"\btime\.time\b|\bfrom time import .*\btime\b")
    for folder in ("engine", "backends"):
        for path in (package / folder).rglob("*.py"):
            assert not wall_clock.search(path.read_text()), path


INTERRUPTED = """
    import asyncio
    import fcntl
    import pathlib
    import sys
    import termios

    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs

    async def main():
        folder = pathlib.Path(sys.argv[1])
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=3)
        await manager.start()
        try:
            calls = [manager.run(jobs.spin, folder / "spins"), manager.run(jobs.hold, folder)]
            await asyncio.gather(*calls)
        finally:
            await manager.stop(grace=0)

    if __name__ == "__main__":
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal that this session belongs to
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            print("interrupted")
"""


def test_ctrl_c_in_a_terminal_prints_nothing_from_workers(tmp_path: Path) -> None:
    """A real one: the kernel signals whatever runs in the terminal's foreground."""
    folder = tmp_path / "folder"
    folder.mkdir()
    script = tmp_path / "program.py"
    script.write_text(dedent(INTERRUPTED))
    terminal, programs_end = pty.openpty()
    output = b""
    try:
        with subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdin=programs_end,
            stdout=programs_end,
            stderr=programs_end,
            start_new_session=True,
            env={**os.environ, **ALL_WARNINGS, "PYTHONPATH": str(ROOT)},
        ) as program:
            os.close(programs_end)
            wait_until(lambda: len(list(folder.iterdir())) == 2, timeout=20)
            os.write(terminal, b"\x03")
            deadline = time.monotonic() + 20
            while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                try:
                    output += os.read(terminal, 4096)
                except OSError:  # nobody has it open any more: all of them are gone
                    break
            program.kill()
    finally:
        os.close(terminal)
    assert output == b"^Cinterrupted\r\n"
    assert program.returncode == 0
