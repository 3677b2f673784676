"""Functions that report how far they are."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
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
    from contextvars import copy_context

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
