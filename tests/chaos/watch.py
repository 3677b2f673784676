"""Observers beside the engine: the order of the line, and the processes that really exist.

``watch_line`` puts a line that keeps its own account in the place of a manager's, before it is
started; nothing in the engine is changed. ``Sampler`` compares ``stats()`` with ``/proc``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leasepool_django import LeasedExecutorManager
from leasepool_django.engine.line import Line, Slot, Waiter
from tests import leaks
from tests.process_table import FORK_SERVER

__all__ = [
    "LineWatch",
    "Sampler",
    "Samples",
    "WorkerCensus",
    "private_bytes",
    "resident_bytes",
    "steady_memory",
    "trim_memory",
    "watch_line",
]

PROC = Path("/proc")
SPAWNED = b"leasepool_django.backends.process.worker"
PAGE = os.sysconf("SC_PAGE_SIZE")
M_ARENA_MAX = -8  # malloc.h
SAMPLE_SECONDS = 0.05


# --- the line -------------------------------------------------------------------------------------


class LineWatch:
    """The account of one line, kept by the order in which callers joined it.

    Only called under the dispatcher's lock, so it sees joining and granting in their real order.
    """

    def __init__(self, offend: Callable[[str], None]) -> None:
        self.joined = 0
        self.granted = 0
        self.sent_ahead = 0
        self.longest = 0
        self._offend = offend
        # dicts are ordered: the first key is the one that joined first.
        self._waiting: dict[Waiter, None] = {}
        self._returned: set[Waiter] = set()

    def join(self, waiter: Waiter) -> None:
        self.joined += 1
        self._waiting[waiter] = None
        self.longest = max(self.longest, len(self._waiting))

    def rejoin(self, waiter: Waiter) -> None:
        """A call that no worker has received comes back, ahead of all that never had one."""
        self._returned.add(waiter)

    def leave(self, waiter: Waiter) -> None:
        self._waiting.pop(waiter, None)
        self._returned.discard(waiter)

    def grant(self, waiter: Waiter) -> None:
        self.granted += 1
        if waiter in self._returned:
            self._returned.discard(waiter)
            return
        first = next(iter(self._waiting), None)
        if self._returned:
            self._offend(f"{waiter!r} was served before a call that had been served before")
        elif first is not waiter:
            self._offend(f"{waiter!r} overtook {first!r} in a line of {len(self._waiting)}")
        self._waiting.pop(waiter, None)

    def pass_by(self) -> None:
        """Somebody is served who has not stood in line."""
        if self._waiting or self._returned:
            self._offend(f"a newcomer overtook a line of {len(self._waiting)}")


class _Waiting(OrderedDict[Waiter, None]):
    """The line's own store: whoever is taken out of it, other than by leaving, was served."""

    watch: LineWatch

    def __delitem__(self, waiter: Waiter) -> None:
        super().__delitem__(waiter)
        self.watch.sent_ahead += waiter.ahead is not None
        self.watch.grant(waiter)

    def clear(self) -> None:
        for waiter in list(self):
            self.watch.leave(waiter)
        super().clear()


class _WatchedLine(Line):
    def __init__(self, watch: LineWatch) -> None:
        super().__init__()
        self._watch = watch
        self._serving = False
        self.waiting = _Waiting()
        self.waiting.watch = watch

    def join(self, waiter: Waiter) -> None:
        super().join(waiter)
        self._watch.join(waiter)

    def rejoin(self, waiter: Waiter) -> None:
        super().rejoin(waiter)
        self._watch.leave(waiter)
        self._watch.rejoin(waiter)

    def leave(self, waiter: Waiter) -> None:
        OrderedDict.__delitem__(self.waiting, waiter)
        self._watch.leave(waiter)

    def take(self, workers: int) -> list[Slot] | None:
        taken = super().take(workers)
        if taken is not None and not self._serving:
            self._watch.pass_by()
        return taken

    def take_one(self) -> Slot | None:
        taken = super().take_one()
        if taken is not None:
            self._watch.pass_by()
        return taken

    def grants(self) -> Iterator[tuple[Waiter, list[Slot]]]:
        self._serving = True
        try:
            yield from super().grants()
        finally:
            self._serving = False


def watch_line(manager: LeasedExecutorManager, offend: Callable[[str], None]) -> LineWatch:
    """Observe the line of a manager that has not been started yet."""
    watch = LineWatch(offend)
    account = manager._dispatcher
    account.line = account.ahead.line = _WatchedLine(watch)
    return watch


# --- processes and memory -------------------------------------------------------------------------


def resident_bytes(pid: int | str = "self") -> int:
    """The resident set size of a process."""
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE


def private_bytes() -> int:
    """How much memory of its own this process has; pieces shared with workers do not count."""
    for line in (PROC / "self" / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell RssAnon")


def steady_memory() -> None:
    """Have the C library keep one heap for all threads: many make memory look as if it grew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def trim_memory() -> None:
    """Let the C library give back what it only keeps for later, so that a leak can be seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start time (clock ticks) of a process; ``None`` if it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1]), int(fields[19])


class WorkerCensus:
    """Counts the worker processes of this process, whoever is their parent by now.

    A forked worker keeps the command line of its fork server, which ends with this process's
    number; a spawned one has the mark of this run in its environment. What a worker starts has a
    worker for its parent and does not count.
    """

    def __init__(self) -> None:
        self._tail = str(os.getpid()).encode()
        self._mark = os.environ[leaks.MARK].encode()
        self._known: dict[tuple[int, int], bool] = {}  # (pid, start) -> one of these processes
        self.found: dict[int, int] = {}  # the workers at the last count, and their parents

    def count(self) -> int:
        """How many workers live at this moment; one that has ended and is not reaped does not."""
        family: dict[int, int] = {}
        known: dict[tuple[int, int], bool] = {}
        for entry in os.listdir(PROC):  # noqa: PTH208 - many times a second
            if not entry.isdigit():
                continue
            pid = int(entry)
            stat = _stat(pid)
            if stat is None or stat[0] in "ZX":
                continue
            key = (pid, stat[2])
            ours = self._known.get(key)
            if ours is None:
                ours = self._is_ours(pid)
            known[key] = ours
            if ours:
                family[pid] = stat[1]
        self._known = known
        servers = {pid for pid, parent in family.items() if parent == os.getpid()}
        others = family.keys() - servers
        self.found = {pid: family[pid] for pid in others if family[pid] not in others}
        return len(self.found)

    def _is_ours(self, pid: int) -> bool:
        try:
            words = (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if SPAWNED in words:
                return self._mark in (PROC / str(pid) / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return words[-1] == self._tail and FORK_SERVER.encode() in words


@dataclass
class Samples:
    """What a ``Sampler`` saw. ``agreeing``: while ``stats()`` stood still; ``equal``: of these."""

    taken: int = 0
    agreeing: int = 0
    equal: int = 0
    most: int = 0
    longest_difference: float = 0.0


class Sampler:
    """A thread that compares ``stats()`` with the processes there are, many times a second.

    ``lag``: for how many seconds they may differ while both stand still. It is the time from a
    fork, or from a process's end, to the report of it: long only if the fork server is stopped.
    """

    def __init__(
        self, manager: LeasedExecutorManager, offend: Callable[[str], None], lag: float
    ) -> None:
        self._lag = lag
        self.samples = Samples()
        self._manager = manager
        self._bound = manager.max_pools * manager.workers_per_pool
        self._offend = offend
        self._census = WorkerCensus()
        self._stop = threading.Event()
        self._different: tuple[Any, int, float] | None = None

    @contextmanager
    def sampling(self) -> Iterator[Samples]:
        """Sample as long as the block runs."""
        thread = threading.Thread(target=self._serve, name="chaos-sampler")
        thread.start()
        try:
            yield self.samples
        finally:
            self._stop.set()
            thread.join()

    def _serve(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                self._sample()
            except Exception as error:  # noqa: BLE001 - the run reports it
                self._offend(f"the sampler failed: {error!r}")
                return

    def _picture(self) -> tuple[int, tuple[object, ...]]:
        stats = self._manager.stats()
        pids = (worker.pid for pool in stats.pools for worker in pool.workers)
        ends = (stats.workers_crashed, stats.workers_killed, stats.start_failures)
        return stats.live_workers, (*pids, stats.workers_started, *ends)

    def _sample(self) -> None:
        before = self._picture()
        found = self._census.count()
        after = self._picture()
        samples = self.samples
        samples.taken += 1
        samples.most = max(samples.most, found)
        if found > self._bound:
            self._offend(
                f"{found} worker processes, and {self._bound} are allowed: with their parents "
                f"{self._census.found}; {self._manager.stats()}"
            )
        if before != after:
            self._different = None
            return
        samples.agreeing += 1
        live, _ = after
        if found == live:
            samples.equal += 1
            self._different = None
            return
        now = time.monotonic()
        if self._different is None or self._different[:2] != (after, found):
            self._different = (after, found, now)
        lasted = now - self._different[2]
        samples.longest_difference = max(samples.longest_difference, lasted)
        if lasted > self._lag:
            self._offend(f"stats() tells of {live} workers for {lasted:.1f} s; there are {found}")
