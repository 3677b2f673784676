"""Ending what a measurement has started: every process of a session, whatever its group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["end_session"]

_PATIENCE = 5.0  # seconds; a process that the kernel holds for longer is left to it


def end_session(leader: int) -> None:
    """Kill all processes of the session that ``leader`` began, and wait until they are gone.

    Workers may have process groups of their own, and may be starting others meanwhile.
    """
    end = time.monotonic() + _PATIENCE
    while members := list(_members(leader)):
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() >= end:
            return
        time.sleep(0.01)


def _members(leader: int) -> Iterator[int]:
    """The processes of a session that have not ended; ended ones may wait for their parents."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry, "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        # Behind the name, which may hold anything: state, parent, group, session.
        state, _, _, session = stat.rpartition(")")[2].split()[:4]
        if int(session) == leader and state not in {"Z", "X"}:
            yield int(entry.name)
