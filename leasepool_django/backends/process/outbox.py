"""What is on its way to a worker: over its socket, and through shared memory.

Used by whoever drives the worker, one thread at a time.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from . import wire
from .shared import THRESHOLD, Payload, Segment

__all__ = ["Outbox"]

_DROP = wire.frame(wire.DROP, b"")


class Outbox:
    """Frames that wait for the socket, and the two segments of a worker.

    ``results`` is where the worker writes large results; ``results_read`` says whether something in
    this process may refer to it, so that the worker must not write there again; ``streamed``,
    whether the last payload with buffers was large and had to go over the socket.
    """

    def __init__(self, channel: socket.socket, max_shared_bytes: int) -> None:
        self.unsent: list[memoryview] = []
        self.results: Segment | None = None
        self.results_read = False
        self.streamed = False
        self._arguments: Segment | None = None  # what calls are written to
        self._channel = channel
        self._max_shared_bytes = max_shared_bytes
        self._descriptor: int | None = None  # goes along with the first byte

    def put(self, payload: bytes | Payload, *, in_thread: bool) -> None:
        """Make ``payload`` what is sent next: through shared memory if it is large enough.

        ``in_thread``: the caller is a thread that an event loop should not have to wait for.
        """
        if self.results_read:
            self.results_read = False
            if self.results is not None and self.results.in_use:
                self._give_up_results()
                self.unsent.append(memoryview(_DROP))
        parts: list[Any] = [payload]
        if isinstance(payload, Payload):
            shared = self._share(payload, in_thread=in_thread)
            self.streamed = shared is None and payload.size >= THRESHOLD
            parts = shared or payload.frame(wire.CALL_PARTS)
        for part in parts:
            view = memoryview(part)
            if view.nbytes:
                self.unsent.append(view)

    def _share(self, payload: Payload, *, in_thread: bool) -> list[Any] | None:
        """Write ``payload`` to shared memory; ``None`` if the socket has to carry it."""
        if not THRESHOLD <= payload.size <= self._max_shared_bytes:
            return None
        segment = self._arguments
        try:
            if segment is None or segment.size < payload.size:
                segment = Segment.create(payload.size)
            try:
                segment.write(payload, in_thread=in_thread)
            except BaseException:
                if segment is not self._arguments:
                    segment.close()
                raise
        except OSError:
            return None  # no memory or no descriptor left
        size = 0
        if segment is not self._arguments:
            self.give_up_arguments()
            self._arguments = segment
            self._descriptor = segment.fd
            size = segment.size
        return [wire.frame(wire.CALL_SHARED, size.to_bytes(8, "little") + payload.layout())]

    def offer(self, size: int) -> None:
        """Give the worker a segment for a result of ``size`` bytes, or word that there is none."""
        self._give_up_results()
        granted = 0
        try:
            self.results = Segment.create(size)
        except OSError:
            pass  # no memory or no descriptor left: the socket carries it
        else:
            granted = self.results.size
            self._descriptor = self.results.fd
        self.unsent.append(memoryview(wire.frame(wire.OFFER, granted.to_bytes(8, "little"))))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes; ``OSError`` when the worker is gone."""
        while self.unsent:
            ancillary = []
            if self._descriptor is not None:
                rights = self._descriptor.to_bytes(4, sys.byteorder)
                ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
            try:
                sent = self._channel.sendmsg(self.unsent[:64], ancillary)
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

    def give_up_arguments(self) -> None:
        """The function kept a part of its arguments: the segment must not be written again."""
        if self._arguments is not None:
            self._arguments.close()
            self._arguments = None

    def _give_up_results(self) -> None:
        if self.results is not None:
            self.results.close()
            self.results = None

    def close(self) -> None:
        """Nobody drives the worker any more: let go of its memory."""
        self.unsent.clear()
        self.give_up_arguments()
        self._give_up_results()
