"""Where large shared memory is let go of: not on an event loop.

To free a megabyte takes a fifth of a millisecond and more, without the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable

from .shared import Segment

__all__ = ["Closer"]

CLOSED_HERE = 1 << 22  # bytes; closing less takes no millisecond
MOST_WAITING = 1 << 28  # bytes that wait to be freed, unless it is a single segment


class Closer:
    """Closes segments on another thread, as long as there is one. Takes no lock."""

    def __init__(self) -> None:
        self._elsewhere: Callable[[Callable[[], None]], None] | None = None
        self._waiting: dict[Segment, None] = {}
        self._closing: dict[Segment, None] = {}

    def open(self, elsewhere: Callable[[Callable[[], None]], None]) -> None:
        """From now on ``elsewhere`` runs what takes long."""
        self._elsewhere = elsewhere

    def let_go(self, segment: Segment) -> None:
        """Any thread: close ``segment``, now or soon."""
        waiting = sum(other.size for other in [*self._waiting, *self._closing])
        if segment.size < CLOSED_HERE or (waiting and waiting + segment.size > MOST_WAITING):
            segment.close()
            return
        self._waiting[segment] = None
        # It is taken away before what waits is closed for the last time.
        elsewhere = self._elsewhere
        if elsewhere is None:
            self._close_all()
        else:
            elsewhere(self._close_all)

    def close(self) -> None:
        """Close what waits; from now on segments are closed where they are let go of."""
        self._elsewhere = None
        self._close_all()

    def discard(self) -> None:
        """After a fork, in the child: also what the other thread was closing."""
        self._elsewhere = None
        for segment in list(self._closing):
            segment.close()
        self._closing.clear()
        self._close_all()

    def _close_all(self) -> None:
        while self._waiting:
            try:
                segment, _ = self._waiting.popitem()
            except KeyError:  # another thread has taken the last one
                return
            self._closing[segment] = None
            try:
                segment.close()
            finally:
                self._closing.pop(segment, None)
