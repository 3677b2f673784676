"""What a test leaves behind: processes, threads and file descriptors.

Used by the fixture in ``conftest``, around every test. A process counts when it descends from the
test process, or when it carries this run's mark in its environment: a worker whose fork server
was killed, and what such a worker started, belong to ``init`` by then and are found by the mark.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from asgiref.sync import SyncToAsync

from tests.settings import DATABASE_FILE
from tests.waiting import NotInTimeError, wait_until

__all__ = [
    "PATIENCE",
    "Process",
    "Snapshot",
    "kill",
    "mark_children",
    "new_since",
    "report",
    "take_snapshot",
]

MARK = "LEASEPOOL_TESTS_RUN"
PROC = Path("/proc")
# Seconds in which what a test stopped has to be gone.
PATIENCE = 5.0


@dataclass(frozen=True)
class Process:
    """One process. ``started`` (clock ticks since boot) tells it from a later one of its pid."""

    pid: int
    started: int


@dataclass(frozen=True)
class Snapshot:
    """What the test process has at one moment; or, from ``new_since``, what it has too many."""

    processes: frozenset[Process]
    threads: frozenset[threading.Thread]
    descriptors: Counter[str]

    def __bool__(self) -> bool:
        return bool(self.processes or self.threads or self.descriptors)


def mark_children() -> None:
    """Give every process started from now on, and their children, the mark of this run."""
    os.environ[MARK] = uuid.uuid4().hex


def take_snapshot() -> Snapshot:
    """Return what there is now. Without ``/proc`` only threads are seen."""
    return Snapshot(_processes(), _threads(), Counter(_descriptors().values()))


def new_since(before: Snapshot, *, timeout: float | None = None) -> Snapshot:
    """Return what there is beyond ``before``, once nothing is left or ``timeout`` seconds passed.

    What is only waiting for the garbage collector does not count: it runs where something is left,
    and not after every test, since it takes long with so many modules imported.
    """
    leaked = Snapshot(frozenset(), frozenset(), Counter())

    def left() -> Snapshot:
        now = take_snapshot()
        return Snapshot(
            now.processes - before.processes,
            now.threads - before.threads,
            now.descriptors - before.descriptors,
        )

    def nothing_is_left() -> bool:
        nonlocal leaked
        leaked = left()
        if leaked:
            gc.collect()
            leaked = left()
        if leaked and not leaked.threads:
            # Not before an executor's thread has ended and its locks are collected: the
            # resource tracker would take those away from under them.
            _stop_multiprocessing_servants(leaked.processes)
        return not leaked

    # The caller judges: running into the deadline is an answer here, not an error.
    with suppress(NotInTimeError):
        wait_until(nothing_is_left, timeout=PATIENCE if timeout is None else timeout)
    return leaked


def report(leaked: Snapshot) -> str:
    """Describe what is left: command lines, where threads stand, which descriptors."""
    lines = ["left behind by this test:"]
    lines += [f"  process {process.pid}: {_describe(process)}" for process in leaked.processes]
    frames = sys._current_frames()
    for thread in leaked.threads:
        lines.append(f"  thread {thread.name} (daemon: {thread.daemon})")
        if frame := frames.get(thread.ident or 0):
            lines += [f"    {line}" for line in "".join(traceback.format_stack(frame)).splitlines()]
    for number, target in sorted(_descriptors().items()):
        if target in leaked.descriptors:
            lines.append(f"  descriptor {number}: {target} ({leaked.descriptors[target]} too many)")
    return "\n".join(lines)


def kill(processes: frozenset[Process]) -> None:
    """Kill what a test left running, so that it cannot disturb the tests after it."""
    for process in processes & _processes():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        # Not ours to reap when something else is its parent, or waits for it already.
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def _processes() -> frozenset[Process]:
    """Return the living descendants, this process's own zombies, and marked processes."""
    parents: dict[Process, int] = {}
    marked: set[Process] = set()
    mark = f"{MARK}={os.environ[MARK]}".encode() if MARK in os.environ else None
    for entry in PROC.glob("[0-9]*"):
        try:
            state, parent, *rest = _fields(entry)
            # A zombie of another parent is that parent's to reap; in a container perhaps never.
            if state in "ZX" and int(parent) != os.getpid():
                continue
            process = Process(int(entry.name), int(rest[17]))
            parents[process] = int(parent)
            if mark and mark in (entry / "environ").read_bytes().split(b"\0"):
                marked.add(process)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or another user's
    family = {os.getpid()}
    found: set[Process] = set()
    while kin := {p for p, parent in parents.items() if parent in family} - found:
        found |= kin
        family |= {process.pid for process in kin}
    return frozenset(process for process in found | marked if process.pid != os.getpid())


def _fields(entry: Path) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` that follow the command's name (proc(5))."""
    return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()


def _describe(process: Process) -> str:
    entry = PROC / str(process.pid)
    try:
        state, parent, *_ = _fields(entry)
        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "ended meanwhile"
    return f"state {state}, parent {parent}: {command.strip() or '(no command line)'}"


def _threads() -> frozenset[threading.Thread]:
    executor = SyncToAsync.single_thread_executor
    assert isinstance(executor, ThreadPoolExecutor)
    # asgiref keeps one thread for the process's life, for all thread-sensitive synchronous code.
    kept = executor._threads
    # A dummy stands for a thread that Python did not start; nobody can tell when it ends.
    return frozenset(
        thread
        for thread in threading.enumerate()
        if thread not in kept and not isinstance(thread, threading._DummyThread)
    )


def _descriptors() -> dict[int, str]:
    """Return the targets of the open descriptors by number."""
    found: dict[int, str] = {}
    for entry in (PROC / "self" / "fd").glob("*"):
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        # Django keeps the connection to the test database until the run ends.
        if not target.startswith(DATABASE_FILE):
            found[int(entry.name)] = target
    return found


def _stop_multiprocessing_servants(processes: frozenset[Process]) -> None:
    """Stop the standard library's fork server and resource tracker if the test started them.

    Both stay until the interpreter ends, once used. CPython's own tests stop them like this.
    """
    pids = {process.pid for process in processes}
    forkserver = getattr(multiprocessing, "forkserver", None)
    if forkserver is not None and forkserver._forkserver._forkserver_pid in pids:
        forkserver._forkserver._stop()
    tracker = getattr(multiprocessing, "resource_tracker", None)
    if tracker is not None and tracker._resource_tracker._pid in pids:
        tracker._resource_tracker._stop()
