"""Frames on a stream socket: an 8-byte header (body length, kind), then the body.

Sans I/O: bytes in, frames out. Both sides and both directions use it, for a worker's own socket and
for the control socket of the fork server. Standard library only: every worker imports this.
"""

from __future__ import annotations

import os
import pickle
import sys
from struct import Struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

__all__ = ["FrameReader", "frame", "message"]

HEADER = Struct("<Q")  # body length << 8 | kind
pack = HEADER.pack
unpack_from = HEADER.unpack_from
HEADER_SIZE = HEADER.size
RECEIVE = 1 << 16  # bytes asked for at once; a larger body is received in place
FIRST_PIECE = 1 << 24  # bytes of a body for which there is room before any has come
# Nothing larger can be on its way.
LARGEST_BODY = (
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if hasattr(os, "sysconf")
    else sys.maxsize  # Windows, where options are read all the same
)

# parent -> worker
CALL = 1
CALL_PARTS = 10  # with out-of-band buffers, see shared.Payload
CALL_SHARED = 11  # the payload is in a segment, which the worker fetches if it is a new one
OFFER = 12  # a segment, with its descriptor, or (of no bytes, without) none
DROP = 13  # forget a segment, which the body names
LOOK = 14  # in the tray: what comes next is on the socket
RESULTS = b"\x01"  # ... or an empty one: it is still in use here
ARGUMENTS = b"\x02"  # it will not be written again
# worker -> parent
READY = 2
FAILED = 3
LOG = 4
RESULT = 5
ERROR = 6
RESULT_PARTS = 7
RESULT_SHARED = 8
NEED = 9  # a segment for a result of so many bytes: 8 bytes, little-endian
FETCH = 15  # the segment of the call that was just read
PROGRESS = 20  # what the running call reports, pickled; only if its caller listens
# Added to an outcome:
RETIRING = 0x80  # the worker takes no further call and leaves
KEPT = 0x40  # the function kept something that refers to the argument segment
PLAIN = 0x3F  # masks both
# After these outcomes, and only these, the worker looks in its tray for what comes next; after the
# others, with which something has to be settled, on its socket.
OPENS_TRAY = frozenset({RESULT, ERROR})
# parent -> fork server
PREPARE = 16
START = 17
KILL = 18
# fork server -> parent
PREPARED = 32
STARTED = 33
NOT_STARTED = 34
EXITED = 35
REMARK = 36

LARGEST_KIND = 0xFF
# parent <- reader: what came is no frame
GARBLED = 0
_OUTCOMES = (RESULT, ERROR, RESULT_PARTS, RESULT_SHARED)
_KINDS = frozenset(
    {CALL, CALL_PARTS, CALL_SHARED, OFFER, DROP}
    | {READY, FAILED, LOG, RESULT, ERROR, RESULT_PARTS, RESULT_SHARED, NEED, FETCH, PROGRESS}
    | {PREPARE, START, KILL, PREPARED, STARTED, NOT_STARTED, EXITED, REMARK}
)

# Before the name of a function in a call: its caller listens to what it reports.
REPORTS = "!"

# The exit status of a worker whose socket a function has closed or replaced.
CUT_OFF = 113
# ... of one that has had enough calls: its end may be reported before its last outcome is read.
RETIRED = 114
# ... and of one in which something was raised outside of any function: by a signal handler that a
# function had left behind, or since a function had damaged the interpreter. Its standard error has
# the traceback.
BROKEN = 115


def frame(kind: int, body: bytes) -> bytes:
    """One frame, ready to be sent."""
    return pack(len(body) << 8 | kind) + body


LOOK_FRAME = frame(LOOK, b"")


def message(kind: int, *values: Any) -> bytes:
    """A frame whose body is a pickled tuple of plain values."""
    return frame(kind, pickle.dumps(values, 5))


class FrameReader:
    """Turns received bytes into frames.

    While ``wanted`` is not ``None`` a large body is on its way: receive straight into it and call
    ``filled``. Otherwise give what was received to ``feed``. Whatever length a header claims, room
    is made for twice of what has come, and for ``FIRST_PIECE``.
    """

    def __init__(self) -> None:
        self.rest = b""  # the beginning of a frame whose end has not come yet
        self.wanted: memoryview | None = None
        self._body = bytearray()
        self._missing = 0  # bytes of it for which there is no room yet
        self._kind = 0

    @property
    def between_frames(self) -> bool:
        """Whether everything received so far has been handed out."""
        return not self.rest and self.wanted is None

    def feed(self, data: bytes) -> list[tuple[int, bytes | bytearray]]:
        """Return the complete frames; the beginning of a further one is kept.

        ``GARBLED`` stands for what cannot be a frame: the stream is of no use any more. A list, so
        that nothing is left to do here when the last frame hands the stream to another thread.
        """
        frames: list[tuple[int, bytes | bytearray]] = []
        if self.rest:
            data = self.rest + data
            self.rest = b""
        start, end = 0, len(data)
        while end - start >= HEADER_SIZE:
            (head,) = unpack_from(data, start)
            length = head >> 8
            body = start + HEADER_SIZE
            if end - body < length:
                self._kind = head & LARGEST_KIND
                if self._kind & PLAIN not in _KINDS or length > LARGEST_BODY:
                    frames.append((GARBLED, b""))
                    return frames
                if length > RECEIVE:
                    self._body = bytearray(min(length, FIRST_PIECE))
                    self._missing = length - len(self._body)
                    self._body[: end - body] = data[body:end]
                    self.wanted = memoryview(self._body)[end - body :]
                    return frames
                break
            start = body + length
            frames.append((head & LARGEST_KIND, data[body:start]))
        self.rest = data[start:]
        return frames

    def receive_rest(self, channel: socket.socket) -> tuple[int, bytes | bytearray] | None:
        """Receive the rest of a large body from a socket that blocks; ``None`` at its end."""
        frame = None
        while frame is None:
            assert self.wanted is not None
            count = channel.recv_into(self.wanted)
            if not count:
                return None
            frame = self.filled(count)
        return frame

    def filled(self, count: int) -> tuple[int, bytes | bytearray] | None:
        """``count`` bytes were received into ``wanted``; the frame, if that completes it."""
        assert self.wanted is not None
        self.wanted = self.wanted[count:]
        if self.wanted:
            return None
        self.wanted = None
        if self._missing:
            size = len(self._body)
            more = min(size, self._missing)
            try:
                self._body += bytes(more)
            except MemoryError:
                return GARBLED, b""
            self._missing -= more
            self.wanted = memoryview(self._body)[size:]
            return None
        body, self._body = self._body, bytearray()
        return self._kind, body
