"""The ``inline`` backend, for tests: calls run in the caller's own process.

They are held to what worker processes ask for: functions are found by name, arguments and results
go through pickle, a call has a context of its own, exceptions arrive as they would from a worker.
A blocking caller runs its function itself. That of an asynchronous caller runs on another thread,
so that the event loop goes on and the function may do what asynchronous code may not, as in a
worker: under Django on the thread that ``sync_to_async`` uses, whose database connections are the
caller's. A running call cannot be stopped, and a crash is the whole process's.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import worker
from ..engine.config import duration
from ..engine.line import Call
from ..exceptions import WorkerStartError
from ..worker import Reporting, enter_inline_call, reporting
from .base import Backend, Host, Worker
from .process import wire
from .process.carriers import Carriers
from .process.encoding import Encoder
from .process.errors import leading_frames
from .process.options import OPTIONS, make_setup
from .process.outcomes import decode
from .process.pickling import cannot_be_reported, explain_result, shown_name
from .process.preparation import initialize, main_module
from .process.remote import encode_exception, resolve
from .process.shared import Payload, dump, load_parts

if TYPE_CHECKING:
    from ..engine.config import ManagerConfig
    from ..engine.line import Slot
    from ..engine.progress import Listener

__all__ = ["InlineBackend"]

# Of the frames that stand above the function's in a traceback.
_MODULES = frozenset({__name__, reporting.__module__})
_FILES = frozenset({__file__, worker.__file__})
_TRACEBACK = BaseException.__dict__["__traceback__"]
_Frame = bytes | Payload
_InThread = Callable[[Callable[[], None]], Awaitable[None]]


class InlineWorker(Worker):
    """The right to have one call at a time in this process."""

    def __init__(self, backend: InlineBackend, slot: Slot) -> None:
        self.slot = slot
        self._backend = backend
        # Guards who begins a call (its thread, or one who gives it up) and who sets its outcome
        # (its end, or kill). A call whose payload is gone has begun.
        self._lock = threading.Lock()
        self._call: Call | None = None
        self._left = False  # the housekeeper's

    def begin(
        self,
        call: Call,
        home: asyncio.AbstractEventLoop,
        *,
        eager: bool,  # noqa: ARG002 - the contract's
    ) -> None:
        """See ``Worker.begin``."""
        self._accept(call)
        in_thread = self._backend.in_thread
        if in_thread is None:
            threading.Thread(
                target=self._work, name=f"{self._backend.prefix}-inline", daemon=True
            ).start()
            return
        # In the caller's context, by which asgiref finds the thread.
        _, context = call.payload
        task = home.create_task(self._pass_on(in_thread), context=context)
        # The loop itself refers to a task but weakly.
        self._backend.tasks.add(task)
        task.add_done_callback(self._backend.tasks.discard)

    async def _pass_on(self, in_thread: _InThread) -> None:
        try:
            await in_thread(self._work)
        except BaseException as error:
            taken = self._take()
            if taken is not None:  # or it has begun, and ends by itself
                self._end(taken[0], None, error)
            if not isinstance(error, Exception):
                raise

    def run_blocking(self, call: Call) -> None:
        """See ``Worker.run_blocking``."""
        self._accept(call)
        # A traceback refers to this frame, as to all below it.
        del call
        self._work()

    def _accept(self, call: Call) -> None:
        call.begun = monotonic()
        with self._lock:
            self._call = call
        if call.timeout is not None:
            self.deadline = call.begun + call.timeout
            self._backend.host.housekeeper.wake_by(self.deadline)

    def _take(self) -> tuple[Call, _Frame] | None:
        """Be the one who begins the call, or makes sure that nobody does."""
        with self._lock:
            call = self._call
            if call is None or call.payload is None:
                return None
            (frame, _), call.payload = call.payload, None
            return call, frame

    def _work(self) -> None:
        """On the function's thread: run the call from beginning to end.

        One that was given up meanwhile is not run; its worker never has another.
        """
        taken = self._take()
        if taken is None:
            return
        call, frame = taken
        outcome = Call(None, call.function, None, None)
        try:
            Context().run(self._backend.carry_out, frame, outcome, call.listener)
        finally:
            self._end(call, outcome.value, outcome.error)
            del taken, call, outcome

    def _end(self, call: Call, value: Any, error: BaseException | None) -> None:
        with self._lock:
            told = self.killed
            if not told:
                call.value, call.error = value, error
            self._call = None
            self.deadline = None
        host = self._backend.host
        host.call_ended(self, call, None, retiring=False)
        if not told:
            call.wake_from_anywhere()
        if self.leaving:
            host.housekeeper.post(self.retire)

    def kill(self, error: Callable[[], BaseException]) -> None:
        """See ``Worker.kill``: the caller is told; a function that has begun runs to its end."""
        with self._lock:
            call = self._call
            if call is not None:
                if self.killed:
                    return
                call.error = error()
                self.killed = True
        if call is None:  # its caller was interrupted before the call was here
            self._backend.host.housekeeper.post(self.retire)
            return
        # Before the caller is told, who then lets go of the payload.
        given_up = self._take() is not None
        call.wake_from_anywhere()
        if given_up:
            self._end(call, None, None)

    def retire(self) -> None:
        """See ``Worker.retire``."""
        # Two ways may lead here at once: the end of a call, and the engine.
        if not self._left and self._call is None:
            self._left = True
            self._backend.host.worker_gone(self.slot, crashed=False)


class InlineBackend(Encoder, Backend):
    """Calls in this process. The options are those of ``process``, so that tests need no others.

    All of them are checked. ``preload`` is imported and ``initializer`` called once in this process
    each time the manager starts, however many workers it has; ``context`` and ``hooks`` mean what
    they mean for ``process``. The others concern processes and have no effect.
    """

    name = "inline"
    supports_hooks = True
    supports_progress = True
    supports_prompt_deadlines = False

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """See ``Backend.option_names``."""
        return OPTIONS

    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        for option in options:
            if option not in OPTIONS:
                raise TypeError(
                    f"The backend 'inline' has no option {option!r}. It has those of 'process': "
                    f"{', '.join(sorted(OPTIONS))}."
                )
        duration("start_timeout", options.get("start_timeout", 60.0))
        self.prefix = config.name_prefix
        self._setup = setup = make_setup(config, options)
        Encoder.__init__(self, setup.hooks, setup.context)
        self._hooks = importlib.import_module(setup.hooks) if setup.hooks is not None else None
        self._applied = Carriers(setup.context) if setup.context else None
        # Runs a job on another thread than the loop's; without it there is one for each call.
        self.in_thread: _InThread | None = getattr(self._hooks, "in_thread", None)
        self.tasks: set[asyncio.Task[None]] = set()
        self.host: Host
        self._clear()

    def _clear(self) -> None:
        # The housekeeper's.
        self._prepared = False
        self._wanted: list[Slot] = []  # asked for before that

    def encode(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        listener: Listener | None = None,
    ) -> Any:
        """See ``Encoder.encode``; the caller's context comes along, to find its thread by."""
        return Encoder.encode(self, function, args, kwargs, listener=listener), copy_context()

    # -- starting ----------------------------------------------------------------------------------

    def open(self, host: Host) -> None:
        """See ``Backend.open``."""
        self.host = host
        self.main_importable = main_module() is not None

    def start_worker(self, slot: Slot) -> None:
        """See ``Backend.start_worker``; the first one prepares this process."""
        if self._prepared:
            # Later: the engine does not expect an answer before it has finished asking.
            self.host.housekeeper.post(partial(self._ready, slot))
            return
        self._wanted.append(slot)
        if len(self._wanted) == 1:
            self.host.hand_over(self._prepare)

    def _prepare(self) -> None:
        """On the notifier's thread, where user code may run."""
        failure = None
        try:
            Context().run(self._initialize)
        except BaseException as error:  # noqa: BLE001 - reported as a start that failed
            failure = error
        self.host.housekeeper.post(partial(self._initialized, failure))

    def _initialize(self) -> None:
        enter_inline_call()
        setup, hooks = self._setup, self._hooks

        def preload() -> None:
            for name in setup.preload:
                importlib.import_module(name)

        try:
            if hooks is None:
                preload()
            else:
                hooks.prepare(preload)
            initialize(setup)
        finally:
            leave_thread = getattr(hooks, "leave_thread", None)
            if leave_thread is not None:
                leave_thread()

    def _initialized(self, failure: BaseException | None) -> None:
        wanted, self._wanted = self._wanted, []
        self._prepared = failure is None
        for slot in wanted:
            if failure is None:
                self._ready(slot)
                continue
            text = "".join(traceback.format_exception(failure)).rstrip()
            error = WorkerStartError(f"A worker could not get ready.\n{text}", traceback_text=text)
            error.__cause__ = failure if isinstance(failure, Exception) else None
            self.host.start_failed(slot, error)

    def _ready(self, slot: Slot) -> None:
        self.host.worker_ready(slot, InlineWorker(self, slot))

    # -- calls -------------------------------------------------------------------------------------

    def carry_out(self, frame: _Frame, outcome: Call, listener: Listener | None) -> None:
        """Do what a worker does with a call, in its context, up to what it sends back."""
        enter_inline_call()
        try:
            reference, args, kwargs, captured = _loaded(frame)
            if isinstance(reference, str):
                function = resolve(reference.removeprefix(wire.REPORTS))
            else:
                function = reference.function if type(reference) is Reporting else reference
            result = self._run(function, args, kwargs, captured, listener)
            try:
                parts = dump(result, pieces=True)
            except Exception as error:  # noqa: BLE001 - explained
                # It has the culprit's own error as its cause.
                raise explain_result(error, result, shown_name(function))  # noqa: B904
            decode(outcome, wire.RESULT_PARTS, _body(parts), None)
        except BaseException as error:
            frame_locals = getattr(self._hooks, "frame_locals", None)
            ours = leading_frames(error, _MODULES)
            decode(outcome, wire.ERROR, encode_exception(error, frame_locals, ours), None)
            assert outcome.error is not None
            # The frames are here, so a debugger may look into them. Not by assignment, which an
            # exception may forbid.
            _TRACEBACK.__set__(outcome.error, _without_ours(_TRACEBACK.__get__(error)))
            if _is_ctrl_c(error):
                raise
        finally:
            del outcome

    def _run(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        captured: Any,
        listener: Listener | None,
    ) -> Any:
        if listener is not None:
            function = partial(reporting, partial(_report, listener), function)
        if self._applied is not None:
            captured, values = captured
            self._applied.apply(values)
        if self._hooks is None:
            return function(*args, **kwargs)
        self._hooks.enter(captured)
        try:
            return function(*args, **kwargs)
        finally:
            self._hooks.leave()

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        """See ``Backend.close``; a function that still runs ends by itself."""
        self._clear()

    def discard(self) -> None:
        """See ``Backend.discard``."""
        self._clear()


def _report(listener: Listener, value: object) -> None:
    """What a worker sends is a copy, or cannot be sent."""
    try:
        body = pickle.dumps(value, 5)
    except Exception as error:  # noqa: BLE001 - explained
        # It has the culprit's own error as its cause.
        raise cannot_be_reported(error, value)  # noqa: B904
    try:
        copy = pickle.loads(body)
    except Exception as error:  # noqa: BLE001 - where a worker's would be unpickled
        listener.cannot_read(error)
    else:
        listener.hear_from_anywhere(copy)


def _loaded(frame: _Frame) -> Any:
    if isinstance(frame, Payload):
        return load_parts(_body(frame))
    return pickle.loads(memoryview(frame)[wire.HEADER_SIZE :])


def _body(payload: Payload) -> bytes:
    """The parts in one piece: a copy, as what comes from another process is."""
    return b"".join(payload.frame(wire.RESULT_PARTS))[wire.HEADER_SIZE :]


def _without_ours(entries: TracebackType | None) -> TracebackType | None:
    while entries is not None and entries.tb_frame.f_code.co_filename in _FILES:
        entries = entries.tb_next
    return entries


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether the user wants this process to end; Python tells the main thread, without words."""
    return (
        isinstance(error, KeyboardInterrupt)
        and not error.args
        and threading.current_thread() is threading.main_thread()
    )
