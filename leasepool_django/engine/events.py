"""What happens in a manager, told to whoever wants to know, on a thread of its own.

Log handlers, subscribers and ``size_provider`` are user code: they may block or raise. They run
here, never on the housekeeper and never under a lock; only ``wants`` is asked anywhere. Backends
free large memory here, too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

__all__ = ["Event", "Notifier", "Subscriber"]

_logger = logging.getLogger("leasepool")


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``kind`` is a name such as ``"lease_expired"``.

    ``facts`` holds its particulars (names, numbers, ids; never argument values).
    """

    kind: str
    manager: str
    text: str
    level: int = logging.DEBUG
    facts: dict[str, Any] = field(default_factory=dict)


class Subscriber(NamedTuple):
    """Who is called with events, and which kinds it wants at present."""

    call: Callable[[Event], None]
    wants: Callable[[str], bool]

    def may_want(self, kind: str) -> bool:
        """``wants``, on any thread; one that raises does so again where it is logged."""
        try:
            return self.wants(kind)
        except Exception:  # noqa: BLE001 - see above
            return True


class Notifier:
    """A daemon thread that runs jobs one after the other, in the order they were put."""

    def __init__(self, name: str, logger: logging.Logger) -> None:
        self._name = name
        self._logger = logger
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._subscribers: list[Subscriber] = []

    def start(self, subscribers: list[Subscriber]) -> None:
        """Start the thread; ``subscribers`` is the manager's own list and may still grow."""
        self._subscribers = subscribers
        thread = threading.Thread(target=self._serve, name=f"{self._name}-notifier", daemon=True)
        thread.start()
        self._thread = thread

    def stop(self, timeout: float) -> None:
        """Run what was put before, then end; waits at most ``timeout`` seconds."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._jobs.put(None)
        if thread is not threading.current_thread():
            thread.join(timeout)

    def put(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon. Takes no lock: allowed in finalizers and signal handlers."""
        self._jobs.put(job)

    def tell(self, event: Event) -> None:
        """Log ``event`` and pass it to the subscribers."""
        self._jobs.put(lambda: self._tell(event))

    def _tell(self, event: Event) -> None:
        self._logger.log(event.level, "%s: %s", event.manager, event.text)
        for subscriber in list(self._subscribers):
            try:
                if subscriber.wants(event.kind):
                    subscriber.call(event)
            except BaseException:
                self._logger.exception("%s: a subscriber raised on %s", event.manager, event.kind)

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except BaseException:
                # Also SystemExit: without this thread nobody would be told anything any more.
                _logger.exception("%s: a notification failed", self._name)
            del job
