"""The child's side: what a worker process does from its first to its last moment.

It reads one call, runs it in a fresh ``contextvars.Context``, sends the outcome, and reads the
next. It ends when its socket does. Standard library only at import: the fork server imports this
before anything of the user's.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, BinaryIO

from ...worker import Reporting, mark_worker, reporting
from . import wire
from .carriers import Carriers
from .errors import forget_frames, leading_frames, note
from .link import LOST, Link
from .preparation import Setup, flush_streams, initialize, prepare, rare_collections
from .records import forwarding
from .shared import COPIED_WHOLE, THRESHOLD, Buffer, Payload, dump, load_parts
from .system import (
    adopt_orphans,
    ask_for_time_slice,
    dead_children,
    die_with_parent,
    live_on,
    mark_of_this_process,
    raise_oom_score,
    resident_bytes,
)
from .timers import Timers, use, watch
from .tray import TrayReader

__all__ = ["main", "run"]

# A worker with more children than this that have ended, and that nobody waits for, is replaced: a
# program's own children come to the worker when it ends. Only their parent could tell them from
# those that a function still means to wait for.
MOST_DEAD_CHILDREN = 32
CALLS_BETWEEN_LOOKS = 64
TIME_SLICE = 0.01  # seconds; the kernel's default is 0.7 to 3 ms

dumps, pack = pickle.dumps, wire.pack
modules = sys.modules
# Of the frames that stand above the function's in a traceback; a carrier or hook is the project's.
_MODULES = frozenset(
    {
        __name__,
        Link.__module__,
        Payload.__module__,
        Carriers.__module__,
        reporting.__module__,
    }
)


def main(source: BinaryIO, fds: str, parent: str) -> None:
    """Entry point of a spawned worker after ``BOOT``; the rest of ``source`` is the ``Setup``."""
    setup = pickle.load(source)
    source.close()
    ends = [int(fd) for fd in fds.split(",")]
    for fd in ends:
        os.set_inheritable(fd, False)
    os._exit(run(ends, int(parent), setup, None))


def run(ends: list[int], parent: int, setup: Setup, hooks: Any) -> int:
    """Be a worker until the server hangs up; returns the exit status.

    ``ends``: the descriptors of its socket and of what its tray is read from, where there is one.
    """
    mark_worker()
    os.setpgid(0, 0)
    die_with_parent(parent)
    adopt_orphans()
    raise_oom_score()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, live_on)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel = socket.socket(fileno=ends[0])
    link = forwarding.link = Link(channel, TrayReader(ends[1:]) if ends[1:] else None)
    try:
        if setup.spawn:
            watch()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            with rare_collections():
                hooks = prepare(setup)
        _begin(setup, hooks)
    except BaseException:  # noqa: BLE001 - the parent shows it
        link.send(wire.message(wire.FAILED, traceback.format_exc()))
        return 1
    link.send(wire.message(wire.READY))
    try:
        return _serve(link, setup, hooks)
    except BaseException as error:  # noqa: BLE001 - nobody else is left to show it
        if isinstance(error, OSError) and error.errno in LOST:
            return wire.CUT_OFF
        with suppress(Exception):  # the interpreter may be damaged
            traceback.print_exc()
        return wire.BROKEN
    finally:
        flush_streams()


def _begin(setup: Setup, hooks: Any) -> None:
    # Line by line: what is printed before a kill must not be lost.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # else every forked worker would draw the same numbers
    if setup.nice:
        os.nice(setup.nice)
    if setup.scheduling == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        ask_for_time_slice(TIME_SLICE)
    if hooks is not None and setup.tests is not None:
        hooks.follow_tests(setup.tests)
    initialize(setup)


def _serve(link: Link, setup: Setup, hooks: Any) -> int:
    runner = _Runner(link, setup, hooks)
    next_frame, call, loads = link.next_frame, runner.call, pickle.loads
    while True:
        frame = next_frame()
        if frame is None:
            return 0
        kind, body = frame
        if kind == wire.CALL:
            leaving = call(loads, body)
        elif kind == wire.CALL_PARTS:
            # The list is the only holder of a large body, and loading empties it.
            bodies = [body]
            del frame, body
            leaving = call(_load_only_copy, bodies)
        elif kind == wire.CALL_SHARED:
            # Not while the call runs: what is raised here, by a signal handler that a function has
            # left behind, belongs to none, and leaves an answer unread.
            link.fetch_arguments(body)
            leaving = call(link.read_arguments, body)
        elif kind == wire.DROP:
            link.drop(body)
            leaving = False
        else:
            return wire.CUT_OFF
        if leaving:
            return wire.RETIRED


def _load_only_copy(bodies: list[Buffer]) -> Any:
    return load_parts(bodies.pop())


class _Runner:
    """Runs calls and sends their outcomes."""

    def __init__(self, link: Link, setup: Setup, hooks: Any) -> None:
        # Here, as it may be impossible when they are needed.
        from . import pickling  # noqa: F401
        from .remote import encode_exception, resolve

        self.encode_exception, self.resolve = encode_exception, resolve
        self.link = link
        self.opens_tray = wire.OPENS_TRAY if link.tray is not None else frozenset()
        self.hooks = hooks
        self.functions: dict[str, Callable[..., Any]] = {}
        self.own = mark_of_this_process()
        self.calls = 0
        self.max_tasks = setup.max_tasks
        self.max_rss = setup.max_rss
        self.max_shared = setup.max_shared
        self.limited = setup.max_tasks is not None or setup.max_rss is not None
        self.carriers = Carriers(setup.context) if setup.context else None
        self.bare = hooks is None and self.carriers is None
        if hooks is not None:
            self.enter, self.leave = hooks.enter, hooks.leave
        self.timers = Timers()

    def call(self, load: Callable[[Any], Any], body: Any) -> bool:
        """Run the call that ``load`` makes of ``body``; whether this worker leaves now."""
        out: bytes | Payload
        kind = wire.RESULT
        try:
            try:
                reference, args, kwargs, captured = load(body)
            except BaseException as error:
                note(error, "Raised in the worker, when it unpickled the call's arguments.")
                raise
            if type(reference) is str:
                function = self.functions.get(reference)
                if function is None:
                    function = self._resolve(reference)
            elif type(reference) is Reporting:
                function = partial(reporting, self._report, reference.function)
            else:
                function = reference
            if self.bare:
                result = Context().run(function, *args, **kwargs)
            else:
                result = self._run_in_context(function, args, kwargs, captured)
            del args, kwargs, captured
            if type(result) in COPIED_WHOLE:
                out = self._dumps(result, function)
            else:
                buffers: list[pickle.PickleBuffer] = []
                try:
                    out = dumps(result, 5, buffer_callback=buffers.append)
                    if buffers or len(out) >= THRESHOLD:
                        out = Payload([out], [buffer.raw() for buffer in buffers])
                except Exception:  # noqa: BLE001 - tried in another way, and then explained
                    out = self._dumps(result, function)
                del buffers
            del result
        except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
            args = kwargs = captured = result = None  # noqa: F841 - what they hold is let go
            kind = wire.ERROR
            out = self._failure(error)
            # The traceback holds the function's frames and so its arguments.
            forget_frames(error)
            del error
        if not self.own[0]:
            os._exit(0)  # the function forked, and this is the child coming back
        if use.noted:
            self.timers.cancel()
        self.calls += 1
        if (
            isinstance(out, Payload)
            and self.max_shared >= out.size >= THRESHOLD
            and self.link.share(out)
        ):
            # Only the layout is left to send; ``out`` may refer to the argument segment.
            kind, out = wire.RESULT_SHARED, out.layout()
        flags = 0
        if self.link.segments_used and self.link.arguments_kept():
            flags = wire.KEPT
        leaving = self.limited and self._has_had_enough()
        if __name__ not in modules:
            leaving = True  # cleared: the next call could import nothing
        if not self.calls % CALLS_BETWEEN_LOOKS and dead_children() > MOST_DEAD_CHILDREN:
            leaving = True
        if leaving:
            flags |= wire.RETIRING
        if isinstance(out, Payload):
            kind = wire.RESULT_PARTS | flags
            self.link.send(*out.frame(kind))
        else:
            kind |= flags
            self.link.send(pack(len(out) << 8 | kind) + out)
        self.link.at_tray = kind in self.opens_tray
        return leaving

    def _has_had_enough(self) -> bool:
        if self.max_tasks is not None and self.calls >= self.max_tasks:
            return True
        return self.max_rss is not None and resident_bytes() > self.max_rss

    def _run_in_context(
        self, function: Callable[..., Any], args: Any, kwargs: Any, captured: Any
    ) -> Any:
        context = None
        if self.carriers is not None:
            captured, values = captured
        if self.hooks is not None:
            context = self.hooks.template(captured)
            if context is not None:
                context, captured = context.copy(), None  # all of it is in there
        if context is None:
            context = Context()
        if self.carriers is not None:
            context.run(self.carriers.apply, values)
        if self.hooks is None:
            return context.run(function, *args, **kwargs)
        return context.run(self._run_hooked, function, args, kwargs, captured)

    def _run_hooked(
        self, function: Callable[..., Any], args: Any, kwargs: Any, captured: Any
    ) -> Any:
        self.enter(captured)
        try:
            return function(*args, **kwargs)
        finally:
            self.leave()

    def _resolve(self, reference: str) -> Callable[..., Any]:
        # A decorated function is called as it was found: by its wrapper.
        function = self.resolve(reference.removeprefix(wire.REPORTS))
        if reference.startswith(wire.REPORTS):
            function = partial(reporting, self._report, function)
        self.functions[reference] = function
        return function

    def _report(self, value: object) -> None:
        """Send what the running call reports."""
        try:
            body = pickle.dumps(value, 5)
        except Exception as error:  # noqa: BLE001 - explained
            from .pickling import cannot_be_reported

            # It has the culprit's own error as its cause.
            raise cannot_be_reported(error, value)  # noqa: B904
        try:
            self.link.send(wire.frame(wire.PROGRESS, body))
        except OSError as error:
            if error.errno not in LOST:
                raise  # by a signal handler of the function's, which expects it

    def _dumps(self, result: Any, function: Callable[..., Any]) -> bytes | Payload:
        """The slow way: takes memoryviews too, and does not copy large ``bytes``."""
        if type(result) in (bytes, bytearray) and len(result) < THRESHOLD:
            return pickle.dumps(result, 5)
        try:
            return dump(result, pieces=True)
        except Exception as error:  # noqa: BLE001 - explained
            from .pickling import explain_result, shown_name

            # It has the culprit's own error as its cause.
            raise explain_result(error, result, shown_name(function))  # noqa: B904

    def _failure(self, error: BaseException) -> bytes:
        frame_locals = self.hooks.frame_locals if self.hooks is not None else None
        return self.encode_exception(error, frame_locals, leading_frames(error, _MODULES))
