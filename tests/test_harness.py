"""What the other tests rely on: leaks are found, and waits end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asgiref.sync import async_to_sync, sync_to_async

from tests import leaks
from tests.waiting import NotInTimeError, async_wait_until, wait_until

if TYPE_CHECKING:
    from tests.conftest import LoopRunner

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a sleeper in a session of its own, prints its pid and is gone: the sleeper is an orphan.
ORPHANING = f"""
import os, subprocess
nowhere = subprocess.DEVNULL
child = subprocess.Popen({SLEEPER!r}, stdout=nowhere, stderr=nowhere, start_new_session=True)
print(child.pid, flush=True)
os._exit(0)
"""


def test_a_child_process_is_found_and_killed() -> None:
    before = leaks.take_snapshot()
    child = subprocess.Popen(SLEEPER)
    leaked = leaks.new_since(before, timeout=0)
    assert [process.pid for process in leaked.processes] == [child.pid]
    assert "time.sleep(600)" in leaks.report(leaked)
    leaks.kill(leaked.processes)
    child.wait()  # reaped by kill() already; tells Popen so
    assert not leaks.new_since(before)


def test_a_child_that_nobody_reaped_is_found() -> None:
    before = leaks.take_snapshot()
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    leaked = leaks.new_since(before, timeout=0)
    assert [process.pid for process in leaked.processes] == [child.pid]
    assert "state Z" in leaks.report(leaked)
    child.wait()


def test_an_orphan_is_found_by_the_mark_of_the_run() -> None:
    before = leaks.take_snapshot()
    answer = subprocess.run(
        [sys.executable, "-c", ORPHANING], check=True, stdout=subprocess.PIPE, text=True
    )
    orphan = int(answer.stdout)
    leaked = leaks.new_since(before, timeout=0)
    assert [process.pid for process in leaked.processes] == [orphan]
    leaks.kill(leaked.processes)
    assert not leaks.new_since(before)


def test_a_thread_is_found_with_its_stack() -> None:
    before = leaks.take_snapshot()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten", daemon=True)
    thread.start()
    try:
        leaked = leaks.new_since(before, timeout=0)
        assert leaked.threads == {thread}
        text = leaks.report(leaked)
        assert "thread forgotten (daemon: True)" in text
        assert "in wait" in text
    finally:
        stop.set()
        thread.join()
    assert not leaks.new_since(before)


def test_a_descriptor_is_found_with_its_target() -> None:
    before = leaks.take_snapshot()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        leaked = leaks.new_since(before, timeout=0)
        assert leaked.descriptors.total() == 2
        assert f"descriptor {ours.fileno()}: socket:[" in leaks.report(leaked)
    assert not leaks.new_since(before)


def test_what_only_waits_for_the_collector_is_no_leak() -> None:
    class Holder:
        def __init__(self) -> None:
            self.ends = os.pipe()
            self.myself = self

        def __del__(self) -> None:
            for end in self.ends:
                os.close(end)

    before = leaks.take_snapshot()
    Holder()
    assert not leaks.new_since(before, timeout=0)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_standard_librarys_own_servants_are_no_leak(method: str) -> None:
    before = leaks.take_snapshot()
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert executor.submit(abs, -1).result() == 1
    assert not leaks.new_since(before)


def test_asgirefs_threads_are_no_leak() -> None:
    before = leaks.take_snapshot()

    async def both_ways() -> int:
        return await sync_to_async(async_to_sync(in_a_thread))()

    async def in_a_thread() -> int:
        return await asyncio.to_thread(threading.get_ident)

    assert asyncio.run(both_ways()) != threading.get_ident()
    assert not leaks.new_since(before)


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory for a run of its own, with this run's fixtures."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makeconftest(
        "from tests import leaks\nfrom tests.conftest import *\nleaks.PATIENCE = 0.2\n"
    )
    return pytester


def test_a_leaking_test_fails_and_the_next_one_starts_clean(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        f"""
        import subprocess

        def test_leaks():
            global child
            child = subprocess.Popen({SLEEPER!r})

        def test_is_clean():
            child.wait()
        """
    )
    result = inner.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*left behind by this test:", "*process *time.sleep(600)*"])


def test_a_failed_test_is_not_reported_twice(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        f"""
        import subprocess

        def test_fails():
            child = subprocess.Popen({SLEEPER!r})
            assert child.pid == 0
        """
    )
    result = inner.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(failed=1)


def test_wait_until_returns_the_value_it_waited_for() -> None:
    start = time.monotonic()
    assert wait_until(lambda: time.monotonic() - start > 0.02 and "here") == "here"


def test_wait_until_says_what_it_waited_for() -> None:
    with pytest.raises(NotInTimeError, match=r"^not within 0\.01 s: a sign of life$"):
        wait_until(lambda: None, timeout=0.01, message="a sign of life")
    with pytest.raises(NotInTimeError, match=r": 3 seen$"):
        wait_until(lambda: None, timeout=0, message=lambda: f"{1 + 2} seen")


def test_async_wait_until_lets_the_loop_run(loop_runner: LoopRunner) -> None:
    async def main() -> str:
        happened: list[str] = []
        asyncio.get_running_loop().call_later(0.01, happened.append, "tick")
        await async_wait_until(lambda: happened)
        with pytest.raises(NotInTimeError):
            await async_wait_until(lambda: len(happened) > 1, timeout=0.01)
        return happened[0]

    assert loop_runner(main()) == "tick"


def test_loop_runner_runs_on_the_loop_it_names(loop_runner: LoopRunner) -> None:
    async def main() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    assert loop_runner(main()) == loop_runner.name
