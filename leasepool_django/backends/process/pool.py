"""The ``process`` backend: workers made by a fork server, driven by whoever holds their slot.

This module is the parent's side of a worker's life: asking the fork server for it, waiting until
it is ready, noticing its end. All of it runs on the housekeeper's thread, but for ``encode``,
which is every caller's.

Long because a worker may end at any point of its life, and its fork server at any point of that.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...engine.config import duration
from ...engine.events import Event
from ...engine.housekeeper import Timer
from ...exceptions import UnsupportedBackendError, WorkerCrashedError, WorkerStartError
from ..base import Backend, Host
from . import pickling, wire
from .closing import Closer
from .control import ForkServerProcess
from .driver import HANG_UP_SECONDS, ProcessWorker
from .encoding import Encoder
from .options import OPTIONS, make_setup, max_shared_bytes
from .outcomes import crashed, manner
from .preparation import main_module

if TYPE_CHECKING:
    from ...engine.config import ManagerConfig
    from ...engine.line import Call, Slot

__all__ = ["ProcessBackend"]

LEAVE_SECONDS = 5.0  # how long a worker that was asked to leave may take
REPORT_SECONDS = 10.0  # how late the fork server may report the end of a worker
# How often, and how long apart, to look whether a driver has noticed that its worker is dead.
LOOKS, LOOK_SECONDS = 20, 0.005
_NOT_LAUNCHED = "The fork server could not be started: {}."
_CUT_OFF = "the function had closed its connection to this process"
# Exit statuses by which a worker says why it had to end, and what its caller is told.
_REASONS = {
    wire.CUT_OFF: _CUT_OFF,
    wire.BROKEN: (
        "something was raised in it outside of any function: by a signal handler that a function "
        "had left behind, or because a function had damaged the interpreter; its standard error "
        "has the traceback"
    ),
}


class ProcessBackend(Encoder, Backend):
    """Worker processes. These are its options.

    ``initializer``, ``initargs``: called in each worker before its first call (a callable or a
    dotted path). ``mp_context``: ``"forkserver"`` (default where there is ``fork``), ``"spawn"``,
    or such a ``multiprocessing`` context. ``preload``: modules imported once, before workers are
    forked. ``max_tasks_per_child``: calls after which a worker is replaced;
    ``max_rss_per_child``: resident bytes above which it is replaced after its call. ``nice``:
    added to the niceness; ``scheduling``: ``"normal"`` or ``"idle"``. ``start_timeout``: seconds a
    worker may take to get ready. ``context``: dotted paths of
    ``ContextVar`` objects, or of others with ``capture()`` and ``apply()``, that are carried along
    with calls. ``hooks``: dotted path of a module run around calls.
    """

    name = "process"
    supports_kill = True
    supports_isolation = True
    supports_log_forwarding = True
    supports_hooks = True
    supports_progress = True

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """See ``Backend.option_names``."""
        return OPTIONS

    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        if sys.platform == "win32":
            raise UnsupportedBackendError(
                "The process backend needs fork or spawn with passed sockets, which Windows does "
                "not have. Use the backend 'thread'."
            )
        for option in options:
            if option not in OPTIONS:
                raise TypeError(
                    f"The backend 'process' has no option {option!r}. It has: "
                    f"{', '.join(sorted(OPTIONS))}."
                )
        self._config = config
        self._start_timeout = duration("start_timeout", options.get("start_timeout", 60.0))
        self._setup = make_setup(config, options)
        self.max_shared_bytes = max_shared_bytes(options)
        self.closer = Closer()
        Encoder.__init__(self, self._setup.hooks, self._setup.context)
        target = config.process_logging.target_logger
        self.log_target = logging.getLogger(target) if isinstance(target, str) else target
        self._clear()

    def _clear(self) -> None:
        self._host: Host
        self._server: ForkServerProcess | None = None
        self._prepared = False
        self._server_failure: str | None = None
        self._wanted: list[Slot] = []  # asked for while the fork server prepares
        self._workers: dict[int, ProcessWorker] = {}
        self._orphans: dict[int, ProcessWorker] = {}  # outlived their fork server
        self._numbers = itertools.count(1)
        self._timers: dict[int, Timer] = {}

    def crash(self, worker: ProcessWorker, call: Call) -> WorkerCrashedError:
        """The error for a call whose worker died by itself."""
        hint = ""
        if worker.unreported:
            hint = "its end was not reported, because its fork server was stopped or hung"
        elif worker.lost:
            hint = "the fork server that made it died, and it died with it"
        elif worker.status is None:
            hint = "it had not received the call, nor had others that it was sent to"
        elif worker.offence:
            hint = f"it was killed because {worker.offence}"
        else:
            hint = _REASONS.get(worker.status, "")
        return crashed(pickling.shown_name(call.function), worker.pid, worker.status, hint)

    # -- the fork server ---------------------------------------------------------------------------

    def open(self, host: Host) -> None:
        """Launch the fork server; the first workers wait for it to be prepared."""
        self._host = host
        self.closer.open(host.hand_over)
        # What workers pickle from the main module says __mp_main__.
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])
        try:
            self._launch()
        except OSError as error:
            raise WorkerStartError(_NOT_LAUNCHED.format(error)) from error
        # While it prepares. A process that has run out of descriptors can import nothing more.
        from . import records, remote  # noqa: F401

    def _launch(self) -> None:
        main = main_module()
        self.main_importable = main is not None
        setup = self._setup._replace(argv=tuple(sys.argv), main=main, tests=self._describe_tests())
        self._prepared = False
        self._server_failure = None
        server = ForkServerProcess(setup, self._replied)
        self._server = server
        self._host.housekeeper.watch(server.fileno(), partial(self._server_said, server))
        self._set_timer(0, self._start_timeout, self._server_is_late)

    def _server_said(self, server: ForkServerProcess) -> None:
        if not server.receive():
            self._server_lost()

    def _server_is_late(self) -> None:
        self._server_failure = (
            f"Preparing the fork server took longer than start_timeout ({self._start_timeout:g} s):"
            " its imports (main module, Django, preload) hang or are slow."
        )
        self._server_lost()

    def _replied(self, kind: int, values: tuple[Any, ...], pidfd: int | None) -> None:
        if kind == wire.PREPARED:
            self._prepared = True
            self._cancel_timer(0)
            wanted, self._wanted = self._wanted, []
            server = self._server
            for slot in wanted:
                if self._server is server:  # unless a worker before has failed the start
                    self.start_worker(slot)
        elif kind == wire.FAILED:
            self._server_failure = (
                "The fork server could not prepare workers (main module, Django, preload):\n"
                f"{values[0]}"
            )
        elif kind == wire.REMARK:
            self._host.tell(
                Event("fork_server_remark", self._config.name_prefix, values[0], logging.WARNING)
            )
        elif kind == wire.STARTED:
            worker = self._workers.get(values[0])
            if worker is not None:
                worker.started(values[1], pidfd)
                # Not before: one that is in use must be known by its number, and killable.
                self._host.housekeeper.watch(
                    worker.channel.fileno(), partial(self._starting, worker)
                )
            elif pidfd is not None:
                os.close(pidfd)
        elif kind == wire.NOT_STARTED:
            worker = self._forget(values[0])
            if worker is not None:
                worker.ended(None)
                self._fail(worker.slot, f"A worker could not be started: {values[1]}.", None)
        elif kind == wire.EXITED:
            worker = self._forget(values[0])
            if worker is not None:
                self._ended(worker, values[1])

    def _server_lost(self) -> None:
        """The fork server is gone, or useless; its workers die with it."""
        server, self._server = self._server, None
        if server is None:
            return
        self._cancel_timer(0)
        self._host.housekeeper.unwatch(server.fileno())
        status = server.close()
        failure = self._server_failure or f"The fork server (pid {server.pid}) {manner(status)}."
        if self._prepared or not self._server_failure:
            name = self._config.name_prefix
            self._host.tell(Event("fork_server_lost", name, failure, logging.ERROR))
        # Also a worker that it has made and not told of, and what its workers had started.
        server.kill_left_behind(self._host.housekeeper.call_later)
        workers, self._workers = list(self._workers.values()), {}
        wanted, self._wanted = self._wanted, []
        for worker in workers:
            self._cancel_timer(worker.number)
            self._unwatch(worker)
            if worker.pidfd is None:
                self._lost(worker, failure)
            else:
                # Its end is not over until the kernel says so.
                self._orphans[worker.number] = worker
                self._host.housekeeper.watch(
                    worker.pidfd, partial(self._orphan_ended, worker, failure)
                )
                worker.end()
        for slot in wanted:
            self._fail(slot, failure, failure)

    def _orphan_ended(self, worker: ProcessWorker, failure: str) -> None:
        assert worker.pidfd is not None
        self._host.housekeeper.unwatch(worker.pidfd)
        del self._orphans[worker.number]
        self._lost(worker, failure)

    def _lost(self, worker: ProcessWorker, failure: str) -> None:
        ready, worker.lost = worker.ready, True
        worker.ended(None)
        if ready:
            self._host.worker_gone(worker.slot, crashed=True)
        else:
            self._fail(worker.slot, failure, failure)

    # -- workers -----------------------------------------------------------------------------------

    def start_worker(self, slot: Slot) -> None:
        """See ``Backend.start_worker``."""
        if self._server is None:
            try:
                self._launch()
            except OSError as error:
                self._fail(slot, _NOT_LAUNCHED.format(error), None)
                return
        if not self._prepared:
            self._wanted.append(slot)
            return
        assert self._server is not None
        try:
            worker = ProcessWorker(self, self._host, slot, next(self._numbers))
        except OSError as error:
            self._fail(slot, f"A worker could not be started: {error}.", None)
            return
        self._workers[worker.number] = worker
        self._set_timer(worker.number, self._start_timeout, partial(self._start_is_late, worker))
        try:
            self._server.start_worker(worker.number, worker.ends)
        except OSError:
            # Its end is read after what it still said.
            self._server.kill()
        finally:
            worker.handed_over()

    def _starting(self, worker: ProcessWorker) -> bool:
        """What a worker says before it is in use: its log records, then READY or FAILED.

        Whether there was anything.
        """
        try:
            frames = worker.receive_frames()
        except (BlockingIOError, ConnectionResetError):
            return False
        if frames is None:
            self._unwatch(worker)  # its end is reported by the fork server
            return False
        ready = False
        for kind, body in frames:
            if kind == wire.LOG:
                self._host.hand_over(partial(worker.log, body, None))
            elif kind == wire.FAILED:
                (worker.failure,) = pickle.loads(body)
            elif kind == wire.READY:
                ready = True
        if ready:
            self._unwatch(worker)
            self._cancel_timer(worker.number)
            worker.ready = True
            self._host.worker_ready(worker.slot, worker)
        return True

    def _start_is_late(self, worker: ProcessWorker) -> None:
        worker.failure = (
            f"It was not ready within start_timeout ({self._start_timeout:g} s) and was killed: "
            "its initializer hangs or is slow."
        )
        worker.end()

    def _ended(self, worker: ProcessWorker, status: int) -> None:
        while not worker.ready and self._starting(worker):
            pass  # the last it said was still in the socket
        asked = worker.leaving and not worker.died_unasked
        meant = asked or worker.killed or status == wire.RETIRED
        worker.ended(status)
        if worker.ready:
            self._tell_gone(worker, crashed=not meant or bool(worker.offence))
            return
        failure = worker.failure or f"It {manner(status)} while it started."
        self._fail(worker.slot, f"A worker could not get ready.\n{failure}", failure)

    def _tell_gone(self, worker: ProcessWorker, *, crashed: bool, looks: int = LOOKS) -> None:
        if crashed and looks and worker.slot.call and not worker.calls and not worker.leaving:
            # Its driver is about to say whether the call had begun: one that dies unused, as often
            # as it is replaced, must not be replaced at once.
            again = partial(self._tell_gone, worker, crashed=crashed, looks=looks - 1)
            self._host.housekeeper.call_later(LOOK_SECONDS, again)
        else:
            self._host.worker_gone(worker.slot, crashed=crashed)

    def _fail(self, slot: Slot, text: str, details: str | None) -> None:
        self._host.start_failed(slot, WorkerStartError(text.rstrip(), traceback_text=details))

    def _forget(self, number: int) -> ProcessWorker | None:
        worker = self._workers.pop(number, None)
        if worker is not None:
            self._cancel_timer(number)
            if not worker.ready:
                self._unwatch(worker)
        return worker

    def _unwatch(self, worker: ProcessWorker) -> None:
        fd = worker.channel.fileno()
        if fd >= 0 and not worker.ready:
            self._host.housekeeper.unwatch(fd)

    def _set_timer(self, number: int, delay: float, job: Callable[[], None]) -> None:
        self._cancel_timer(number)
        self._timers[number] = self._host.housekeeper.call_later(delay, job)

    def _cancel_timer(self, number: int) -> None:
        timer = self._timers.pop(number, None)
        if timer is not None:
            timer.cancel()

    def expect_end(self, worker: ProcessWorker, within: float = LEAVE_SECONDS) -> None:
        """Kill a worker that has been asked to leave if it is still there after a while."""
        if worker.number in self._workers:
            self._set_timer(worker.number, within, worker.end)

    def expect_end_soon(self, worker: ProcessWorker) -> None:
        """Any thread: the worker has said that it leaves."""
        self._host.housekeeper.post(partial(self.expect_end, worker))

    def expect_end_now(self, worker: ProcessWorker) -> None:
        """Any thread: the worker has closed its socket, which only a dying one should."""
        self._host.housekeeper.post(partial(self._hung_up, worker))

    def watch_memory(self, worker: ProcessWorker, after: float) -> None:
        """Any thread: let the worker look after its shared memory in ``after`` seconds."""
        known = weakref.ref(worker)  # it must not live on for this

        def look() -> None:
            if (found := known()) is not None:
                found.look_after_memory()

        def look_later() -> None:
            self._host.housekeeper.call_later(after, look)

        self._host.housekeeper.post(look_later)

    def _hung_up(self, worker: ProcessWorker) -> None:
        if worker.number in self._workers:
            self._set_timer(worker.number, HANG_UP_SECONDS, partial(self._unreported, worker))

    def _unreported(self, worker: ProcessWorker) -> None:
        """Some time after a worker has closed its socket: its end has not been reported."""
        if worker.is_dead or worker.killed:
            self._expect_report(worker)
        else:
            worker.offence = _CUT_OFF
            worker.end()

    def ending(self, worker: ProcessWorker, *, by_number: bool) -> None:
        """The worker has been killed; or is to be, ``by_number``, as it has no descriptor."""
        if worker.number not in self._workers:
            return
        if by_number and self._server is not None:
            try:
                self._server.kill_worker(worker.number)
            except OSError:
                self._server_lost()
                return
        self._expect_report(worker)

    def _expect_report(self, worker: ProcessWorker) -> None:
        # The fork server is slow, or stopped; its workers' callers must not wait for ever.
        self._set_timer(worker.number, REPORT_SECONDS, partial(self._not_reported, worker))

    def _not_reported(self, worker: ProcessWorker) -> None:
        if worker.pidfd is not None and not worker.is_dead:
            self._expect_report(worker)  # it cannot die before its I/O ends
            return
        if self._server is not None:
            self._server_failure = (
                f"The fork server (pid {self._server.pid}) did not report the end of a worker "
                f"within {REPORT_SECONDS:g} s and was killed. Was it stopped?"
            )
            worker.unreported = True
            for other in self._workers.values():  # as long as it can be told from dying with it
                other.unreported = other.unreported or other.is_dead
            self._server.kill()

    def live_workers(self) -> int:
        """See ``Backend.live_workers``."""
        return len(self._workers) + len(self._orphans)

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill what is left of the workers, and the fork server."""
        for timer in self._timers.values():
            timer.cancel()
        server = self._server
        if server is not None:
            self._host.housekeeper.unwatch(server.fileno())
            server.close()
        for worker in [*self._workers.values(), *self._orphans.values()]:
            self._unwatch(worker)
            if worker.pidfd is not None:
                self._host.housekeeper.unwatch(worker.pidfd)
            worker.ended(-9)
        self.closer.close()
        self._clear()

    def discard(self) -> None:
        """See ``Backend.discard``."""
        for worker in [*self._workers.values(), *self._orphans.values()]:
            worker.discard()
        self.closer.discard()
        if self._server is not None:
            self._server.discard()
        self._clear()
