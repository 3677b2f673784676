"""The process that makes workers: started by exec, single-threaded, never runs a user's call.

It prepares once (main module, Django, ``preload``), freezes the garbage collector, and then forks
a ready worker on request, handing over the socket that came with the request. It is the workers'
only reaper and adopts what they leave behind: when a worker ends, everything it had started is
killed before the end is reported. When the server is gone, which it sees on its control socket and
on a descriptor of the server's process, it kills all and ends.
"""

from __future__ import annotations

import gc
import marshal
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from typing import BinaryIO

from ...worker import mark_worker
from . import wire, worker
from .preparation import Setup, boot_command, flush_streams, prepare, rare_collections
from .system import (
    LINUX,
    TUNABLES,
    adopt_orphans,
    children,
    ended_child,
    kill_group,
    live_on,
    open_pidfd,
    open_standard_descriptors,
    reap,
    wait_for_end,
)
from .timers import watch

__all__ = ["main"]

LOOK_MILLISECONDS = 500  # between two looks at what no descriptor tells


def main(source: BinaryIO, control_fd: str, parent: str, tunables: str) -> None:
    """Entry point after ``BOOT``, whose ``source`` has been read.

    ``tunables``: what the server has in its environment as ``TUNABLES``, for what users' functions
    start; this process has its own.
    """
    mark_worker()
    source.close()
    if tunables:
        os.environ[TUNABLES] = tunables
    else:
        os.environ.pop(TUNABLES, None)
    control = socket.socket(fileno=int(control_fd))
    control.settimeout(None)  # see link.Link
    # It came here through exec and must not go further with that.
    os.set_inheritable(control.fileno(), False)
    open_standard_descriptors()
    watch()
    server = ForkServer(control, int(parent))
    with control, server.wakeups, server.wakeup_sender:
        server.serve()


class ForkServer:
    """Its state; see the module's docstring."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self.control = control
        self.parent = parent
        self.workers: dict[int, int] = {}  # pid -> the parent's number for the worker
        self.reader = wire.FrameReader()
        self.ends: list[int] = []  # the descriptors that came with the request
        self.wakeups, self.wakeup_sender = socket.socketpair()
        self.wakeups.setblocking(False)
        self.wakeup_sender.setblocking(False)
        self.parent_fd: int | None = None
        self.strays_left = False  # whether there may be some that could not be looked for
        self.immune: set[int] = set()  # strays of other users, which this one may not kill
        self.setup_body = b""
        self.setup: Setup

    def serve(self) -> None:
        """Until the parent is gone or hangs up."""
        self._take_care_of_signals()
        adopt_orphans()
        try:
            parent_fd = self.parent_fd = open_pidfd(self.parent)
        except ProcessLookupError:
            return
        if os.getppid() != self.parent:
            return
        watched = [self.control.fileno(), self.wakeups.fileno()]
        if parent_fd is not None:
            watched.append(parent_fd)
        poller = select.poll()
        for fd in watched:
            poller.register(fd, select.POLLIN)
        try:
            while True:
                wait = None if parent_fd is not None and not self.strays_left else LOOK_MILLISECONDS
                ready = [fd for fd, _ in poller.poll(wait)]
                if parent_fd in ready or (parent_fd is None and os.getppid() != self.parent):
                    return
                if self.wakeups.fileno() in ready:
                    self.wakeups.recv(4096)
                    self._reap()
                if self.strays_left:
                    self._kill_strays()
                if self.control.fileno() in ready and not self._receive():
                    return
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            self.kill_all()

    def _take_care_of_signals(self) -> None:
        # A service manager signals every process of a service at once: only the server decides.
        # A handler and not SIG_IGN, which users' own subprocesses would inherit through exec.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, live_on)
        signal.signal(signal.SIGCHLD, live_on)
        signal.set_wakeup_fd(self.wakeup_sender.fileno(), warn_on_full_buffer=False)

    def _receive(self) -> bool:
        """Handle what the parent sent; false when it hung up."""
        data, ancillary, _, _ = self.control.recvmsg(
            wire.RECEIVE, socket.CMSG_SPACE(16 * 4), getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.ends += memoryview(payload[: len(payload) // 4 * 4]).cast("i").tolist()
        if not data:
            return False
        for kind, body in self.reader.feed(data):
            self._handle(kind, bytes(body))
        if self.reader.wanted is not None:
            frame = self.reader.receive_rest(self.control)
            if frame is None:
                return False
            self._handle(frame[0], bytes(frame[1]))
        return True

    def _handle(self, kind: int, body: bytes) -> None:
        if kind == wire.PREPARE:
            self._prepare(body)
        elif kind == wire.START:
            number, count = pickle.loads(body)
            ends, self.ends = self.ends, []
            if len(ends) == count:
                self._start(number, ends)
            else:  # the kernel drops what a process has no free descriptor for
                _close(ends)
                reason = "the fork server has run out of file descriptors"
                self.control.sendall(wire.message(wire.NOT_STARTED, number, reason))
        elif kind == wire.KILL:
            (number,) = pickle.loads(body)
            for pid, known in self.workers.items():
                if known == number:
                    os.kill(pid, signal.SIGKILL)

    # -- preparing ---------------------------------------------------------------------------------

    def _prepare(self, body: bytes) -> None:
        try:
            # Until what there is is frozen: the first collection looks at all that was imported.
            with rare_collections():
                self._prepare_workers(body)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:  # noqa: BLE001 - the parent shows it
            self.control.sendall(wire.message(wire.FAILED, traceback.format_exc()))
            raise SystemExit(1) from None
        self.control.sendall(wire.message(wire.PREPARED))

    def _prepare_workers(self, body: bytes) -> None:
        self.setup_body = body
        self.setup = setup = pickle.loads(body)
        self.hooks = None
        if not setup.spawn:
            watch = _ParentWatch(self)
            try:
                self.hooks = prepare(setup)
            finally:
                watch.stop()
            # Loaded here once instead of in every worker at its first error, when there may be no
            # descriptor to load them with.
            from . import pickling, records, remote  # noqa: F401

            threads = [thread.name for thread in threading.enumerate()][1:]
            if threads:
                self.control.sendall(
                    wire.message(
                        wire.REMARK,
                        f"Preparing the fork server started threads ({', '.join(threads)}). "
                        "Workers are forked without them, and with whatever locks they held. Start "
                        "them later, or use mp_context='spawn'.",
                    )
                )
            flush_streams()
            if setup.preload:
                gc.collect()  # takes as long as a tenth of setting Django up, which leaves nothing
            gc.freeze()

    # -- starting ----------------------------------------------------------------------------------

    def _start(self, number: int, ends: list[int]) -> None:
        try:
            pid = self._spawn(ends) if self.setup.spawn else self._fork(ends)
        except OSError as error:
            self.control.sendall(wire.message(wire.NOT_STARTED, number, str(error)))
            return
        finally:
            _close(ends)
        self.workers[pid] = number
        # Not reaped yet, so the number cannot be somebody else's.
        try:
            pidfd = open_pidfd(pid)
        except OSError:  # out of descriptors: KILL does it
            pidfd = None
        started = wire.message(wire.STARTED, number, pid, pidfd is not None)
        if pidfd is None:
            self.control.sendall(started)
        else:
            socket.send_fds(self.control, [started], [pidfd])
            os.close(pidfd)

    def _fork(self, ends: list[int]) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            self.control.close()
            self.wakeups.close()
            self.wakeup_sender.close()
            if self.parent_fd is not None:
                os.close(self.parent_fd)
            code = worker.run(ends, server, self.setup, self.hooks)
        except BaseException:  # noqa: BLE001 - nobody else is left to show it
            traceback.print_exc()
        finally:
            os._exit(code)

    def _spawn(self, ends: list[int]) -> int:
        # An unlinked file, not a pipe: it takes any size at once and needs no second process.
        import tempfile

        with tempfile.TemporaryFile() as source:
            marshal.dump(sys.path, source)
            source.write(self.setup_body)
            source.flush()
            source.seek(0)
            for fd in (*ends, source.fileno()):
                os.set_inheritable(fd, True)
            command = boot_command(
                sys.executable,
                source.fileno(),
                "leasepool_django.backends.process.worker",
                ",".join(map(str, ends)),
                os.getpid(),
            )
            return os.posix_spawn(sys.executable, command, os.environ)

    # -- ending ------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Report workers that ended, after killing whatever they had started."""
        ended = []
        while pid := ended_child():
            number = self.workers.pop(pid, None)
            if number is not None:
                # While it is not reaped, no other process and no other group can have its number.
                kill_group(pid)
            status = reap(pid)
            self.immune.discard(pid)
            if number is not None:
                ended.append((number, os.waitstatus_to_exitcode(status)))
        if not ended:
            return
        # What is in other groups came to this process when the worker died.
        self._kill_strays()
        for number, code in ended:
            self.control.sendall(wire.message(wire.EXITED, number, code))

    def _kill_strays(self) -> None:
        """Kill the children of this process that are not workers.

        A worker adopts the orphans below it while it lives, so they can only be a dead worker's,
        or the preparation's.
        """
        self.strays_left = False
        while LINUX:
            try:
                found = children(os.getpid())
            except OSError:  # no descriptor is left to look with
                self.strays_left = True
                return
            strays = [pid for pid in found if pid not in self.workers and pid not in self.immune]
            if not strays:
                return
            for stray in strays:
                try:
                    os.kill(stray, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                except PermissionError:  # a program that runs as another user
                    self.immune.add(stray)
            for stray in strays:
                # Its own children come to this process when it is gone; the next round finds them.
                try:
                    os.waitpid(stray, os.WNOHANG if stray in self.immune else 0)
                except ChildProcessError:
                    continue

    def kill_all(self) -> None:
        """Kill the workers, and whatever they and the preparation have started."""
        self.control.close()  # there is nobody to tell, and looking for strays needs a descriptor
        for pid in self.workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pid in list(self.workers):
            wait_for_end(pid)
            kill_group(pid)
            reap(pid)
            del self.workers[pid]
        self._kill_strays()


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


class _ParentWatch:
    """Ends this process if the parent dies or hangs up while it prepares, which may take long.

    A thread, gone before the first fork.
    """

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        server = self._server
        poller = select.poll()
        poller.register(self._stop_receiver, select.POLLIN)
        poller.register(server.control, 0)  # reports that the other end is closed, not data
        if server.parent_fd is not None:
            poller.register(server.parent_fd, select.POLLIN)
        wait = None if server.parent_fd is not None else LOOK_MILLISECONDS
        while True:
            ready = [fd for fd, _ in poller.poll(wait)]
            if self._stop_receiver.fileno() in ready:
                return
            if ready or os.getppid() != server.parent:
                server.kill_all()
                os._exit(1)

    def stop(self) -> None:
        self._stop_sender.send(b"\0")
        self._thread.join()
        self._stop_sender.close()
        self._stop_receiver.close()
