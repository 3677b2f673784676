"""Where small calls lie until their worker takes them, also those that are sent to it ahead.

Whoever reads one first has it: the worker, which begins it then, or the server, which wants it
back; the kernel gives a packet to one reader only. So it is known whether a call has been begun,
also when the worker has died, and none is begun twice; unless a function reads here by force.

There are two such places, which take turns: one for the call that is the worker's next, or was and
may not have been taken yet, and one for the call after it, which nobody can take before its turn.
Each is a pipe that keeps packets apart, which takes half as long as a socket. What does not fit,
and what comes with descriptors, is on the worker's socket, and ``wire.LOOK`` lies here instead.

A worker that is killed while it waits for a packet may still receive it, and then never sees it. So
it counts those that it has seen in memory that both processes have.

Standard library only: every worker imports this module.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO

from .shared import seal
from .system import LINUX

__all__ = ["LARGEST", "SUPPORTED", "Tray", "TrayReader"]

SUPPORTED = LINUX and hasattr(os, "memfd_create")
LARGEST = getattr(select, "PIPE_BUF", 512)  # bytes of a packet that is written whole or not at all


class Tray:
    """The server's side. Messages are numbered from 0, not counting those that were taken back.

    ``theirs``: what the worker is given.
    """

    def __init__(
        self, theirs: list[FileIO], readers: list[FileIO], writers: list[FileIO], seen: mmap.mmap
    ) -> None:
        self.theirs = theirs
        self.next = 0  # the number of the next message
        self._last = 0  # that of the one that was put there last
        self._mine = [*readers, *writers]
        self._read: list[Callable[[int], bytes | None]] = [reader.read for reader in readers]
        self._write: list[Callable[[bytes], int | None]] = [writer.write for writer in writers]
        self._seen: mmap.mmap | bytes = seen

    @classmethod
    def create(cls) -> Tray | None:
        """A new one; ``None`` where there is none, ``OSError`` if no descriptors are left."""
        if not SUPPORTED:
            return None
        theirs, readers, writers = [], [], []
        try:
            with ExitStack() as opened:
                for _ in range(2):
                    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
                    theirs.append(opened.enter_context(FileIO(reading, "r")))
                    writers.append(opened.enter_context(FileIO(writing, "w")))
                    os.set_blocking(writing, False)
                    # Where the worker reads, reading blocks; so this process opens it once more.
                    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                    own = os.open(f"/proc/self/fd/{reading}", flags)
                    readers.append(opened.enter_context(FileIO(own, "r")))
                flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
                memory = os.memfd_create("worker-tray", flags)
                theirs.append(opened.enter_context(FileIO(memory, "r+")))
                os.posix_fallocate(memory, 0, 1)
                seal(memory)
                seen = mmap.mmap(memory, 1)
                opened.pop_all()
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            return None  # a sandbox forbids it or has no /proc; no memory, or too many pipes
        return cls(theirs, readers, writers, seen)

    def put(self, message: bytes) -> None:
        """Lay ``message`` there; ``OSError`` if the kernel does not take it."""
        self._last = number = self.next
        self.next = number + 1
        try:
            if self._write[number & 1](message) is None:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        except OSError:
            self.next = number
            raise

    def take_back(self, message: bytes, taken: list[bytes]) -> None:
        """Take ``message``, which was put there last, into ``taken``, unless the worker has it.

        May be done again, with what is in ``taken`` already.
        """
        self._take(self._last, message, taken)
        if taken:
            self.next = self._last

    def never_seen(self, number: int, message: bytes, *, dead: bool) -> bool:
        """Whether a worker that is gone has not seen ``message``, the one with this number.

        ``dead``: its process has ended. Before, it may be about to see what it has received.
        """
        taken: list[bytes] = []
        self._take(number, message, taken)
        return bool(taken) or (dead and self._seen[0] == number & 0xFF)

    def _take(self, number: int, message: bytes, taken: list[bytes]) -> None:
        read = self._read[number & 1]
        while taken != [message]:  # but what a function has put there
            taken.clear()
            # Where a signal handler raises, no assignment follows a call that has returned.
            taken.extend(filter(None, map(read, [LARGEST])))
            if not taken:
                return

    def handed_over(self) -> None:
        """The worker has its ends, or will never have them."""
        for end in self.theirs:
            end.close()

    def close(self) -> None:
        """Let go of it."""
        self.handed_over()
        self._read, self._write = [_nothing] * 2, [_nothing] * 2
        for end in self._mine:
            end.close()
        if isinstance(self._seen, mmap.mmap):
            seen, self._seen = self._seen, self._seen[:1]
            seen.close()


class TrayReader:
    """The worker's side."""

    def __init__(self, fds: list[int]) -> None:
        *reading, memory = fds
        self.ends = [FileIO(fd, "r") for fd in reading]
        self._read = [end.read for end in self.ends]
        self._seen = mmap.mmap(memory, 1)
        os.close(memory)
        self._count = 0

    def take(self) -> bytes:
        """Wait for the next message; empty if the server is gone."""
        count = self._count
        message = self._read[count & 1](LARGEST) or b""
        self._count = count + 1
        self._seen[0] = count + 1 & 0xFF
        return message

    def close(self) -> None:
        """In a process that the worker has forked: it is none of its business."""
        for end in self.ends:
            end.close()
        self._seen.close()


def _nothing(_: object) -> None:
    """What there is to read where it was closed, and how much can be written."""
