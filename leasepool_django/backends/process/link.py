"""A worker's end of its socket, and of the shared memory that belongs to it.

Standard library only: every worker imports this module.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from collections import deque
from typing import Any

from . import wire
from .shared import Buffer, Payload, Segment
from .system import LINUX, live_on
from .tray import TrayReader

__all__ = ["LOST", "Link"]

# What the system says of a socket that somebody has closed, shut down or replaced.
LOST = frozenset(
    {
        errno.EBADF,
        errno.ENOTSOCK,
        errno.ENOTCONN,
        errno.EDESTADDRREQ,
        errno.EOPNOTSUPP,
        errno.EPIPE,
        errno.ECONNRESET,
    }
)
# The signals that a worker lives through, and how its children handle them.
_DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
# Bytes that a socket takes all at once or, when a signal interrupts it, not at all.
_INDIVISIBLE = 1 << 14 if LINUX else 0
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Link:
    """This worker's end of its socket; several threads may log while the main one works.

    ``tray``: where small calls lie; ``at_tray``: whether what comes next lies there.
    """

    def __init__(self, channel: socket.socket, tray: TrayReader | None) -> None:
        # Whatever socket.setdefaulttimeout() says here or said in the server, which made the
        # descriptor: that it does not block came along with it.
        channel.settimeout(None)
        self.channel = channel
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._sending = False
        # What has to be sent before anything else; with each part, how much of it has been sent.
        self._unsent: list[tuple[Buffer, list[int]]] = []
        self._reader = wire.FrameReader()
        self.tray = tray
        self.at_tray = tray is not None
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        self._wait = poller.poll
        self._receive = channel.recv
        self._frames: deque[tuple[int, bytes | bytearray]] = deque()
        self._fds: list[int] = []  # received, and not yet claimed by a frame
        self._arguments: Segment | None = None
        self._results: Segment | None = None
        # Whether segments are to be looked at after the present call: it came by _arguments, or a
        # process was forked, which has what was mapped then and would see what is written there.
        self.segments_used = False
        self._arguments_seen = self._results_seen = False
        self._masks: dict[int, set[int | signal.Signals]] = {}  # of threads that are about to fork
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._after_fork_in_child,
        )

    def _before_fork(self) -> None:
        # A signal that comes right after the fork is the child's own handlers' to take.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFAULTS)
        self._masks[threading.get_ident()] = mask

    def _after_fork(self) -> None:
        self._arguments_seen = self._results_seen = self.segments_used = True
        self._restore_mask()

    def _after_fork_in_child(self) -> None:
        # A child of a user's making must not keep the line open, let alone speak on it; and it is
        # its maker's to terminate, which the worker's own handlers would prevent.
        self.channel.close()
        if self.tray is not None:
            self.tray.close()
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is live_on:
                signal.signal(number, default)
        self._restore_mask()

    def _restore_mask(self) -> None:
        mask = self._masks.pop(threading.get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def next_frame(self) -> tuple[int, bytes | bytearray] | None:
        """Wait for what comes next, wherever that is; ``None`` if the server hung up."""
        if self.at_tray:
            assert self.tray is not None
            data = self.tray.take()
            if not data:
                return None
            body = data[wire.HEADER_SIZE :]
            if data[: wire.HEADER_SIZE] == wire.pack(len(body) << 8 | wire.CALL):
                return wire.CALL, body
            if data != wire.LOOK_FRAME:
                return wire.GARBLED, b""  # a function has put it there
            self.at_tray = False
        return self.receive()

    def receive(self, *, offered: bool = False) -> tuple[int, bytes | bytearray] | None:
        """Wait for the next frame on the socket; ``None`` at its end.

        ``offered``: a descriptor may come with it.
        """
        reader = self._reader
        while not self._frames:
            if reader.wanted is not None:
                return reader.receive_rest(self.channel)
            # One who sleeps in recv is also woken whenever the other end has read, for there is
            # room to send again then; a switch of processes for each call, and for nothing.
            self._wait()
            # recvmsg takes a microsecond more.
            data = self._receive_offered() if offered else self._receive(wire.RECEIVE)
            if not data:
                return None
            if not reader.rest and len(data) >= wire.HEADER_SIZE:
                (head,) = wire.unpack_from(data)
                if len(data) == wire.HEADER_SIZE + (head >> 8):
                    return head & wire.LARGEST_KIND, data[wire.HEADER_SIZE :]
            self._frames.extend(reader.feed(data))
        return self._frames.popleft()

    def _receive_offered(self) -> bytes:
        data, ancillary, _, _ = self.channel.recvmsg(wire.RECEIVE, 64, _CLOSE_ON_EXEC)
        for _, kind, rights in ancillary:
            if kind == socket.SCM_RIGHTS:
                self._fds += memoryview(rights[: len(rights) // 4 * 4]).cast("i").tolist()
        return data

    def fetch_arguments(self, body: bytes | bytearray) -> None:
        """Have the segment of a call there, as far as that is possible."""
        if any(body[:8]):  # its size: a new one
            self._drop_arguments()
            self.send(wire.frame(wire.FETCH, b""))
            self._arguments = self._offered_segment()

    def read_arguments(self, body: bytes | bytearray) -> Any:
        """Unpickle a call from shared memory; what is large in it refers to the segment.

        ``OSError`` if there was no descriptor or no room to map it with.
        """
        self.segments_used = True  # also if not, so that the parent comes with another segment
        if self._arguments is None:
            raise OSError(
                errno.ENOMEM, "no descriptor or no memory was free for the argument's shared memory"
            )
        return self._arguments.read(memoryview(body)[8:])

    def _offered_segment(self) -> Segment | None:
        """Wait for what was asked for; ``None`` if there is none, or it cannot be mapped."""
        size = self._offered()
        if not size or not self._fds:
            return None  # the kernel drops a descriptor that a process has no number left for
        fd = self._fds.pop(0)
        try:
            return Segment(fd, size)
        except (OSError, MemoryError):
            os.close(fd)
            return None

    def arguments_kept(self) -> bool:
        """After a call with ``segments_used``: whether the argument segment is given up.

        That is when something here still refers to it, or a process that was forked can see it.
        """
        self.segments_used = False
        if self._results_seen:
            self._drop_results()
        seen, self._arguments_seen = self._arguments_seen, False
        if self._arguments is not None and not seen and not self._arguments.in_use:
            return False
        self._drop_arguments()
        return True

    def _drop_arguments(self) -> None:
        segment, self._arguments = self._arguments, None
        if segment is not None:
            segment.close()

    def drop(self, body: bytes | bytearray) -> None:
        """Do as a ``DROP`` frame says."""
        if body == wire.ARGUMENTS:
            self._drop_arguments()
        else:
            self._drop_results()

    def _drop_results(self) -> None:
        """Give the result segment up: the parent refers to it, or a forked process has it."""
        self._results_seen = False
        segment, self._results = self._results, None
        if segment is not None:
            segment.close()

    def share(self, payload: Payload) -> bool:
        """Put a result into shared memory; false if the socket has to carry it."""
        if self._results is None or self._results_seen or self._results.size < payload.size:
            self._drop_results()
            self.send(wire.frame(wire.NEED, payload.size.to_bytes(8, "little")))
            self._results = self._offered_segment()
            if self._results is None:
                return False
        try:
            self._results.write(payload)
        except OSError:
            return False  # no memory left
        return True

    def _offered(self) -> int:
        while (frame := self.receive(offered=True)) is not None:
            kind, body = frame
            if kind == wire.OFFER:
                return int.from_bytes(body, "little")
            if kind != wire.DROP:
                break
            self.drop(body)
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def send(self, *parts: Buffer) -> None:
        """Send whole frames. ``send`` on a socket: a reused descriptor is never written to.

        A signal handler may raise at any point, and the function live on: the rest of what was
        begun is then sent before whatever comes next.
        """
        with self._lock:
            if self._sending:
                # A finalizer or signal handler logged in the middle of a frame.
                self._unsent += [(part, []) for part in parts]
                return
            self._sending = True
            try:
                if len(parts) == 1 and len(parts[0]) <= _INDIVISIBLE and not self._unsent:
                    self.channel.sendall(parts[0])
                else:
                    self._unsent += [(part, []) for part in parts]
                if self._unsent:
                    self._send_rest()
            finally:
                self._sending = False

    def _send_rest(self) -> None:
        send = self.channel.send
        while self._unsent:
            part, sent = self._unsent[0]
            rest = memoryview(part)[sum(sent) :]
            if rest:
                # Where a handler raises, no assignment follows a call that has returned. Here the
                # count is noted before any handler runs.
                sent.extend(map(send, [rest]))
            else:
                del self._unsent[0]
