"""Looking at processes from outside, through ``/proc``: who lives, and whose children they are.

What the operating system shows is the judge of what the engine says about its workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tests.leaks import Process
from tests.waiting import wait_until

__all__ = [
    "children",
    "command_line",
    "fork_servers",
    "identify",
    "is_alive",
    "state",
    "wait_gone",
    "worker_pids",
]

PROC = Path("/proc")
FORK_SERVER = "leasepool_django.backends.process.forkserver"


def _fields(pid: int) -> list[str] | None:
    """Return what follows the command's name in ``/proc/<pid>/stat``; ``None`` if it is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def identify(pid: int) -> Process:
    """Return what tells the process from a later one of the same number."""
    fields = _fields(pid)
    assert fields is not None, f"process {pid} is gone already"
    return Process(pid, int(fields[19]))


def state(pid: int) -> str:
    """Return the state's letter (proc(5)); an empty string if there is no such process."""
    fields = _fields(pid)
    return fields[0] if fields is not None else ""


def is_alive(process: Process) -> bool:
    """Whether it still runs; a zombie has ended."""
    fields = _fields(process.pid)
    return fields is not None and fields[0] not in "ZX" and int(fields[19]) == process.started


def wait_gone(processes: Iterable[Process], *, timeout: float) -> None:
    """Wait until none of ``processes`` runs, at most ``timeout`` seconds."""
    listed = list(processes)

    def left() -> list[str]:
        return [
            f"{process.pid} ({command_line(process.pid)})"
            for process in listed
            if is_alive(process)
        ]

    wait_until(lambda: not left(), timeout=timeout, message=lambda: f"still there: {left()}")


def children(pid: int) -> list[int]:
    """Return the children of ``pid`` that have not ended."""
    try:
        listing = (PROC / str(pid) / "task" / str(pid) / "children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [child for child in map(int, listing.split()) if state(child) not in {"", "Z", "X"}]


def command_line(pid: int) -> str:
    """Return the command line with its arguments joined; empty if the process is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def fork_servers(parent: int | None = None) -> list[int]:
    """Return the fork servers that ``parent`` (default: this process) has started."""
    parent = os.getpid() if parent is None else parent
    # A thread's children are listed with the thread; fork servers are started by a housekeeper.
    found: list[int] = []
    for listing in (PROC / str(parent) / "task").glob("*/children"):
        try:
            found += map(int, listing.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has ended
    return [pid for pid in found if FORK_SERVER in command_line(pid)]


def worker_pids(parent: int | None = None) -> list[int]:
    """Return the workers of all managers of ``parent`` (default: this process)."""
    return [worker for server in fork_servers(parent) for worker in children(server)]
