"""The one thread per manager that does all that blocks or waits on time.

It watches descriptors for the backend, runs timers, and once a second (sooner when a deadline
comes first) lets the manager look for expired leases, overdue calls, abandoned grants and closed
loops. It runs no user code. ``post`` takes no lock and is allowed in finalizers and in signal
handlers.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from time import monotonic

__all__ = ["Housekeeper", "Timer"]

TICK = 1.0  # seconds between two looks at what no descriptor tells


class Timer:
    """A function to run at a time; ``cancel`` may be called on the housekeeper's thread."""

    __slots__ = ("job",)

    def __init__(self, job: Callable[[], None]) -> None:
        self.job: Callable[[], None] | None = job

    def cancel(self) -> None:
        """Do not run it."""
        self.job = None


class Housekeeper:
    """A selector loop on a daemon thread. ``tick(now)`` returns the next deadline it knows of."""

    def __init__(self, name: str, logger: logging.Logger, tick: Callable[[float], float]) -> None:
        self._logger = logger
        self._tick = tick
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._drain)
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False
        self._last: Callable[[], None] | None = None
        # Read by other threads without a lock, see wake_by.
        self.next_wake = math.inf
        self._thread = threading.Thread(target=self._serve, name=f"{name}-housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the housekeeper's thread, soon. Takes no lock."""
        self._jobs.put(job)
        self.wake()

    def wake(self) -> None:
        """Look at deadlines now. Takes no lock."""
        try:
            # send() and not os.write(): once closed, the number may be another file's.
            self._wake_sender.send(b"\0")
        except BlockingIOError:
            pass  # it has not read what was written before: it will wake
        except OSError:
            if not self._stopping:
                raise

    def wake_by(self, deadline: float) -> None:
        """Be awake at ``deadline`` (monotonic). The deadline must be findable by ``tick`` first.

        Without a lock: while the housekeeper looks, ``next_wake`` is infinite, so that a deadline
        set after it looked there always wakes it again.
        """
        if deadline < self.next_wake:
            self.wake()

    def watch(self, fd: int, ready: Callable[[], object]) -> None:
        """Call ``ready`` when ``fd`` can be read. On the housekeeper's thread."""
        self._selector.register(fd, selectors.EVENT_READ, ready)

    def unwatch(self, fd: int) -> None:
        """Undo ``watch``; an ``fd`` that is not watched is fine."""
        try:
            self._selector.unregister(fd)
        except KeyError:
            pass

    def call_later(self, delay: float, job: Callable[[], None]) -> Timer:
        """Run ``job`` after ``delay`` seconds. On the housekeeper's thread."""
        timer = Timer(job)
        heapq.heappush(self._timers, (monotonic() + delay, next(self._order), timer))
        return timer

    def stop(self, last: Callable[[], None]) -> None:
        """End the loop after the current job; ``last`` is what the thread does last of all.

        On the housekeeper's thread.
        """
        self._last = last
        self._stopping = True

    def discard(self) -> None:
        """Close this process's copies of the descriptors; after a fork, in the child only."""
        self._stopping = True
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _drain(self) -> None:
        self._wake_receiver.recv(4096)

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._guard(self._round)
        finally:
            self._stopping = True
            self._selector.close()
            self._wake_receiver.close()
            self._wake_sender.close()
            if self._last is not None:
                self._last()

    def _round(self) -> None:
        self.next_wake = math.inf
        wake_at = self._look(monotonic())
        if self._stopping:
            return
        timers = self._timers
        while timers and timers[0][2].job is None:
            heapq.heappop(timers)
        if timers:
            wake_at = min(wake_at, timers[0][0])
        self.next_wake = wake_at
        for key, _ in self._selector.select(max(0.0, wake_at - monotonic())):
            if self._selector.get_map().get(key.fd) is key:
                self._guard(key.data)
        for job in self._due():
            self._guard(job)

    def _due(self) -> Iterator[Callable[[], None]]:
        while not self._stopping:  # what is left then belongs to a life that is over
            try:
                yield self._jobs.get_nowait()
            except Empty:
                break
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            job = heapq.heappop(self._timers)[2].job
            if job is not None:
                yield job
                if self._stopping:
                    break

    def _look(self, now: float) -> float:
        """Return when to look again."""
        try:
            return min(now + TICK, self._tick(now))
        except Exception:
            self._logger.exception("leasepool: the housekeeper failed to look at deadlines")
            return now + TICK

    def _guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            # A defect here must not end the thread that enforces every deadline.
            self._logger.exception("leasepool: the housekeeper failed at %r", job)
