"""Functions that report how far they are."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
from contextvars import copy_context
from pathlib import Path
from typing import Any

from leasepool_django.worker import report_progress
from tests.waiting import wait_until


def count(to: int) -> str:
    """Report each number."""
    for number in range(to):
        report_progress(number)
    return "counted"


def report(value: object) -> str:
    report_progress(value)
    return "reported"


def report_lock() -> None:
    report_progress({"lock": threading.Lock()})


def report_and_fail() -> None:
    report_progress("begun")
    raise ValueError("half way")


def report_and_wait(folder: Path) -> str:
    """Report, wait for ``folder / "go"``, and report again."""
    report_progress("waiting")
    wait_until((folder / "go").exists, timeout=20)
    report_progress("going")
    (folder / "done").touch()
    return "done"


def report_from_threads() -> list[str]:
    """One in a copy of the context, whose report counts, and one without."""

    async def main() -> None:
        await asyncio.to_thread(report_progress, "with context")

    asyncio.run(main())
    thread = threading.Thread(target=report_progress, args=("without",))
    thread.start()
    thread.join()
    return ["with context"]


class Counter:
    """Picklable, with a method that reports."""

    def count(self, to: int) -> str:
        return count(to)


left_behind: list[threading.Thread] = []


def leave_a_thread(folder: Path) -> str:
    """Go on reporting from a thread when the call has ended."""
    context = copy_context()

    def go_on() -> None:
        wait_until((folder / "go").exists, timeout=20)
        context.run(report_progress, "too late")
        (folder / "late").touch()

    thread = threading.Thread(target=go_on)
    thread.start()
    left_behind.append(thread)
    return "left"


def report_from_a_fork() -> int | None:
    """A child has no line to the server."""
    child = multiprocessing.get_context("fork").Process(target=report_progress, args=("child",))
    child.start()
    child.join()
    return child.exitcode


def nested(function: Any, to: int) -> Any:
    """Call one that reports plainly, in a call of this."""
    return function(to)


class Unwilling:
    """Arrives nowhere."""

    def __reduce__(self) -> Any:
        return fail_to_unpickle, ()


def fail_to_unpickle() -> None:
    raise ValueError("not here")


def report_unwilling() -> str:
    return report(Unwilling())


class Exits:
    """Ends whoever reads it."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def report_exit() -> str:
    return report(Exits())


class Talkative:
    """Reports, too, while it is pickled."""

    def __reduce__(self) -> Any:
        report_progress("by the way")
        return Talkative, ()


def report_talkative() -> str:
    return report(Talkative())


def fork_while_reporting(children: int) -> list[int | None]:
    """Two threads report without a pause; children report as well. How those ended."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            report_progress(0)

    threads = [threading.Thread(target=copy_context().run, args=(go_on,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    context = multiprocessing.get_context("fork")
    found = []
    for _ in range(children):
        child = context.Process(target=report_progress, args=("child",))
        child.start()
        child.join(5)
        found.append(child.exitcode)
        child.kill()
    ended.set()
    for thread in threads:
        thread.join()
    return found


managers: list[Any] = []  # that of the test, for calls on threads


def call_another() -> None:
    report_progress("outer")
    managers[0].run_sync(count, 2)
