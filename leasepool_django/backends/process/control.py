"""The parent's side of the fork server: launching it and talking to it.

Used on the housekeeper's thread only, but for ``kill``.
"""

from __future__ import annotations

import marshal
import multiprocessing.spawn
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from . import wire
from .preparation import Setup, boot_command
from .system import LINUX, TUNABLES, kill_marked

__all__ = ["ForkServerProcess"]

SEND_SECONDS = 10.0  # a fork server that does not read for so long is broken
EXIT_SECONDS = 5.0
LOOK_SECONDS = 1.0  # until what could not be looked for is looked for again
# In the environment of the fork server, of its workers, and of what those start.
MARK = "LEASEPOOL_FORK_SERVER"
# Has the C library ask for huge pages. A fork copies a table of all pages, which is shorter then.
HUGE_PAGES = "glibc.malloc.hugetlb=1"


class ForkServerProcess:
    """One running fork server. ``replied(kind, values, pidfd)`` is called for each message."""

    def __init__(self, setup: Setup, replied: Callable[[int, tuple[Any, ...], int | None], None]):
        self._replied = replied
        self._reader = wire.FrameReader()
        self._pidfds: list[int] = []
        self._mark = os.urandom(16).hex()
        self._control, theirs = socket.socketpair()
        try:
            self._control.settimeout(SEND_SECONDS)
            path_reader, path_writer = os.pipe()
            try:
                self._process = _launch(theirs, path_reader, self._mark)
            except BaseException:
                os.close(path_writer)
                raise
            finally:
                # Not to be held open here for one that will not read: writing would not fail.
                theirs.close()
                os.close(path_reader)
            # One that has ended meanwhile: its end is read after what it still said.
            with suppress(BrokenPipeError), os.fdopen(path_writer, "wb") as path:
                marshal.dump([str(entry) for entry in sys.path], path)
            with suppress(BrokenPipeError, ConnectionResetError):
                self._control.sendall(wire.frame(wire.PREPARE, pickle.dumps(setup, 5)))
        except BaseException:
            theirs.close()
            self._control.close()
            if hasattr(self, "_process"):
                self._killed()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def fileno(self) -> int:
        """The descriptor that becomes readable when the fork server says something."""
        return self._control.fileno()

    def start_worker(self, number: int, ends: list[int]) -> None:
        """Ask for a worker that has these descriptors; STARTED or NOT_STARTED follows."""
        message = wire.message(wire.START, number, len(ends))
        socket.send_fds(self._control, [message], ends)

    def kill_worker(self, number: int) -> None:
        """Kill a worker, where there are no process descriptors."""
        self._control.sendall(wire.message(wire.KILL, number))

    def receive(self) -> bool:
        """Handle what has arrived; false when the fork server is gone."""
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0) | socket.MSG_DONTWAIT
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                wire.RECEIVE, socket.CMSG_SPACE(16 * 4), flags
            )
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._pidfds += memoryview(payload[: len(payload) // 4 * 4]).cast("i").tolist()
        if not data:
            return False
        for kind, body in self._reader.feed(data):
            self._handle(kind, body)
        while self._reader.wanted is not None:
            count = self._control.recv_into(self._reader.wanted)
            if not count:
                return False
            frame = self._reader.filled(count)
            if frame is not None:
                self._handle(*frame)
        return True

    def _handle(self, kind: int, body: bytes | bytearray) -> None:
        values = pickle.loads(body)
        pidfd = None
        if kind == wire.STARTED and values[2]:
            # Missing when this process has run out of descriptors.
            pidfd = self._pidfds.pop(0) if self._pidfds else None
        self._replied(kind, values, pidfd)

    def kill(self) -> None:
        """End it by force; its workers die with it."""
        self._process.kill()

    def kill_left_behind(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        """When it has died before its time: kill what its workers had started, and themselves."""
        try:
            kill_marked(MARK, self._mark)
        except OSError:  # no descriptor is left to look with
            call_later(LOOK_SECONDS, partial(self.kill_left_behind, call_later))

    def close(self) -> int:
        """Hang up, upon which it kills its workers and ends; returns its exit status.

        What it should have killed and has not, since it was stopped or killed, is killed here. May
        take ``EXIT_SECONDS``.
        """
        self._close_descriptors()
        try:
            status = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = self._killed()
        if status < 0:
            with suppress(OSError):  # no descriptor is left to look with
                kill_marked(MARK, self._mark)
        return status

    def _killed(self) -> int:
        self._process.kill()
        return self._process.wait()

    def discard(self) -> None:
        """After a fork, in the child: close this copy of the descriptors."""
        self._close_descriptors()
        # It is the parent's child: without a status it would be waited for, and warned about.
        self._process.returncode = 0

    def _close_descriptors(self) -> None:
        self._control.close()
        while self._pidfds:
            os.close(self._pidfds.pop())


def _with_huge_pages() -> dict[str, str]:
    """What the fork server has in its environment for its C library, beside the user's own."""
    own = os.environ.get(TUNABLES, "")
    if not LINUX or HUGE_PAGES.partition("=")[0] in own:
        return {}
    return {TUNABLES: f"{own}:{HUGE_PAGES}" if own else HUGE_PAGES}


def _launch(control: socket.socket, path_reader: int, mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        boot_command(
            os.fsdecode(multiprocessing.spawn.get_executable()),
            path_reader,
            "leasepool_django.backends.process.forkserver",
            control.fileno(),
            os.getpid(),
            os.environ.get(TUNABLES, ""),
        ),
        stdin=subprocess.DEVNULL,
        pass_fds=(control.fileno(), path_reader),
        env={**os.environ, **_with_huge_pages(), MARK: mark},
        # A group of its own keeps Ctrl-C away; a session of its own would make `nice` useless
        # where the kernel groups by session.
        process_group=0,
    )
