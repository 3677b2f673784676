"""What is on its way to a worker: over its socket, and through shared memory.

Used by whoever drives the worker, one thread at a time.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Generator
from typing import Any

from . import wire
from .shared import THRESHOLD, Payload, Segment

__all__ = ["Outbox"]

STEP = 1 << 24  # bytes copied in one go on an event loop: a few milliseconds
MOST_AT_ONCE = 1 << 20  # bytes sent in one go

_DROP_RESULTS = wire.frame(wire.DROP, wire.RESULTS)
_DROP_ARGUMENTS = wire.frame(wire.DROP, wire.ARGUMENTS)


class Outbox:
    """Frames that wait for the socket, and the two segments of a worker.

    ``results`` is where the worker writes large results; ``results_read`` says whether something in
    this process may refer to it, so that the worker must not write there again; ``streamed``,
    whether the last payload with buffers was large and had to go over the socket; ``unwritten``
    stands for a payload that is being written to shared memory, and of which nothing is sent yet;
    ``stale``, whether the segments have not been used for so long that the next call without need
    of them is to ``trim`` them. Both together take no more than ``max_shared_bytes``, but for the
    moment in which one takes the place of another. ``let_go`` is given the segments that are done
    with, and closes them.
    """

    def __init__(
        self, channel: socket.socket, max_shared_bytes: int, let_go: Callable[[Segment], None]
    ) -> None:
        self.unsent: list[memoryview] = []
        self.results: Segment | None = None
        self.results_read = False
        self.streamed = False
        self.stale = False
        self.unwritten: Generator[None, None, None] | None = None
        self._arguments: Segment | None = None  # what calls are written to
        self._channel = channel
        self._max_shared_bytes = max_shared_bytes
        self._let_go = let_go
        self._sharing = False  # whether the last payload with buffers went by the segment
        self._crowded = False  # whether an argument segment, too large by now, took a result's room
        # Goes along with the first byte, and only when the worker has asked: to look for one with
        # each call would take it a microsecond.
        self._descriptor: int | None = None

    def put(self, payload: bytes | Payload, *, in_thread: bool) -> None:
        """Make ``payload`` what is sent next: through shared memory if it is large enough.

        ``in_thread``: the caller is a thread that an event loop should not have to wait for. On a
        loop a payload of more than ``STEP`` bytes is ``unwritten`` then, see ``write_on``.
        """
        if self.results_read:
            self.results_read = False
            if self.results is not None and self.results.in_use:
                self._give_up_results()
                self.unsent.append(memoryview(_DROP_RESULTS))
        if not isinstance(payload, Payload):
            if self.stale:
                self.trim()
            self._append([payload])
            return
        segment = self._segment_for(payload)
        if segment is not None and not in_thread and payload.size > STEP:
            self.unwritten = self._write(segment, payload)
            return
        written = False
        if segment is not None:
            try:
                segment.write(payload, in_thread=in_thread)
                written = True
            except OSError:
                pass  # no memory left
            finally:
                if not written and segment is not self._arguments:
                    self._let_go(segment)
        self._announce(payload, segment if written else None)

    def write_on(self) -> bool:
        """Write the next piece of what is ``unwritten``; true if that was the last, to be sent."""
        assert self.unwritten is not None
        try:
            next(self.unwritten)
        except StopIteration:
            self.unwritten = None
            return True
        except BaseException:
            self.unwritten = None
            raise
        return False

    def _write(self, segment: Segment, payload: Payload) -> Generator[None, None, None]:
        written = False
        try:
            yield from segment.steps(payload, STEP)
            written = True
        except OSError:
            pass  # no memory left
        finally:
            if not written and segment is not self._arguments:
                self._let_go(segment)
        self._announce(payload, segment if written else None)

    def _segment_for(self, payload: Payload) -> Segment | None:
        """Give shared memory for ``payload``; ``None`` if the socket has to carry it."""
        if not THRESHOLD <= payload.size <= self._max_shared_bytes:
            return None
        size = payload.size
        kept = self._arguments
        if kept is not None and (kept.size < size or (self._crowded and kept.reserved > size)):
            self._crowded = False
            self.give_up_arguments()
            self.unsent.append(memoryview(_DROP_ARGUMENTS))
            kept = None
        elif kept is not None:
            size = max(size, kept.reserved)
        if self.results is not None and size + self.results.size > self._max_shared_bytes:
            # Nothing here refers to it by now.
            self._give_up_results()
            self.unsent.append(memoryview(_DROP_RESULTS))
        if self.unsent:
            try:
                self.flush()  # the worker lets go while this writes
            except OSError:
                pass  # it is gone, which sending the call will find out
        if kept is not None:
            return kept
        try:
            return Segment.create(payload.size)
        except OSError:
            return None  # no memory or no descriptor left

    def _announce(self, payload: Payload, segment: Segment | None) -> None:
        """Let the frame that says where ``payload`` is, or has all of it, be sent next."""
        self.streamed = segment is None and payload.size >= THRESHOLD
        self._sharing = segment is not None
        if segment is None:
            self._append(payload.frame(wire.CALL_PARTS))
            return
        size = 0
        if segment is not self._arguments:
            self.give_up_arguments()
            self._arguments = segment
            size = segment.size
        where = size.to_bytes(8, "little") + payload.layout()
        self._append([wire.frame(wire.CALL_SHARED, where)])

    def _append(self, parts: list[Any]) -> None:
        for part in parts:
            view = memoryview(part)
            if view.nbytes:
                self.unsent.append(view)

    @property
    def has_arguments(self) -> bool:
        """Whether there is a segment that calls are written to."""
        return self._arguments is not None

    def offer_arguments(self) -> None:
        """Give the worker the segment that its call was written to."""
        self._offer(self._arguments)

    def offer_results(self, size: int, *, arguments_idle: bool) -> None:
        """Give the worker a segment for a result of ``size`` bytes, or word that there is none.

        ``arguments_idle``: the present call has no payload with buffers.
        """
        self._give_up_results()
        room = self._max_shared_bytes
        if self._arguments is not None:
            crowded = self._arguments.reserved + size > room
            if crowded and (arguments_idle or not self._sharing):
                self.give_up_arguments()
                self.unsent.append(memoryview(_DROP_ARGUMENTS))
            else:
                self._crowded = crowded
                room -= self._arguments.reserved
        if size <= room:
            try:
                self.results = Segment.create(size, at_most=room)
            except OSError:
                pass  # no memory or no descriptor left: the socket carries it
        self._offer(self.results)

    def _offer(self, segment: Segment | None) -> None:
        if segment is not None:
            self._append([wire.frame(wire.OFFER, segment.size.to_bytes(8, "little"))])
            self._descriptor = segment.fd
            try:
                self.flush()
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError:
                # As when too many descriptors of one user's are on their way. Nothing was sent.
                self._descriptor = None
                del self.unsent[-1]
                if segment is self.results:
                    self._give_up_results()
            else:
                return
        self._append([wire.frame(wire.OFFER, bytes(8))])
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes, up to ``MOST_AT_ONCE``; ``OSError`` when the worker is gone.

        Not all that could be sent: the worker may read as fast as this sends, and a loop has others
        to serve.
        """
        parts: list[memoryview] = []
        room = MOST_AT_ONCE
        for view in self.unsent[:64]:
            parts.append(view[:room])
            room -= len(view)
            if room <= 0:
                break
        ancillary = []
        if self._descriptor is not None:
            rights = self._descriptor.to_bytes(4, sys.byteorder)
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
        try:
            sent = self._channel.sendmsg(parts, ancillary)
        except BlockingIOError:
            return
        self._descriptor = None
        while sent:
            first = self.unsent[0]
            if sent < len(first):
                self.unsent[0] = first[sent:]
                break
            sent -= len(first)
            del self.unsent[0]

    def trim(self) -> None:
        """Give both segments up, and send word of that next."""
        self.stale = False
        if self._arguments is not None:
            self.give_up_arguments()
            self.unsent.append(memoryview(_DROP_ARGUMENTS))
        if self.results is not None:
            self._give_up_results()
            self.unsent.append(memoryview(_DROP_RESULTS))

    def give_up_arguments(self) -> None:
        """The function kept a part of its arguments: the segment must not be written again."""
        if self._arguments is not None:
            self._let_go(self._arguments)
            self._arguments = None

    def _give_up_results(self) -> None:
        if self.results is not None:
            self._let_go(self.results)
            self.results = None

    def close(self) -> None:
        """Nobody drives the worker any more: let go of its memory."""
        self.unsent.clear()
        if self.unwritten is not None:
            self.unwritten.close()
            self.unwritten = None
        self.give_up_arguments()
        self._give_up_results()
