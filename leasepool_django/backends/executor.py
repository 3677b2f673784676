"""Any ``concurrent.futures.Executor`` class as a backend: threads, the standard process pool.

One executor is one pool. The engine's guarantees hold as far as the class allows: a running call
cannot be stopped, so a caller that gives up is told at once while its worker stays taken until the
function ends. Argument checks beyond "not a coroutine function" are the executor's own.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from functools import cache, partial
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from ..exceptions import RemoteError, WorkerCrashedError, WorkerStartError
from ..worker import report_nothing, reporting, reports
from .base import Backend, Host, Worker
from .process.carriers import Carriers
from .process.options import checked_hooks, checked_paths

if TYPE_CHECKING:
    from ..engine.config import ManagerConfig
    from ..engine.line import Call, Pool, Slot
    from ..engine.progress import Listener

__all__ = ["ExecutorClassBackend", "ThreadBackend", "adapt"]

_Payload = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class ExecutorWorker(Worker):
    """The right to have one call at a time in an executor."""

    def __init__(self, backend: ExecutorClassBackend, slot: Slot, executor: Executor) -> None:
        self.slot = slot
        self._backend = backend
        self.executor = executor
        self._lock = threading.Lock()  # guards who sets the call's outcome: its end or kill()
        self._call: Call | None = None
        self._left = False  # set by the housekeeper

    def begin(
        self,
        call: Call,
        home: asyncio.AbstractEventLoop,  # noqa: ARG002 - the contract's
        *,
        eager: bool,  # noqa: ARG002 - the contract's
    ) -> None:
        """See ``Worker.begin``."""
        self._submit(call)

    def run_blocking(self, call: Call) -> None:
        """See ``Worker.run_blocking``."""
        if self._submit(call):
            assert call.wakeup is not None
            call.wakeup.acquire()

    def _submit(self, call: Call) -> bool:
        """Pass ``call`` to the executor; false if that is broken and has not begun it."""
        call.begun = monotonic()
        self._call = call
        if call.timeout is not None:
            self.deadline = call.begun + call.timeout
            self._backend.host.housekeeper.wake_by(self.deadline)
        function, args, kwargs = call.payload
        try:
            try:
                future = self.executor.submit(function, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the caller gets it
                if self._left or isinstance(error, BrokenExecutor):
                    self._undelivered(call, error)
                    return False
                self._end(call, None, error, broken=isinstance(error, RuntimeError))
            else:
                call.payload = None
                future.add_done_callback(partial(self._done, call))
        except BaseException:
            # A signal handler's. Whether the call's end will be told nobody knows: kill() must not
            # wait for it.
            self._call = None
            raise
        return True

    def _undelivered(self, call: Call, error: BaseException) -> None:
        """The executor broke before ``call``: another worker may have it."""
        self._call = None
        self.deadline = None
        host = self._backend.host
        if not host.call_undelivered(self, call):
            call.error = _crash(call, error)
            call.wake_from_anywhere()
        host.housekeeper.post(partial(self._leave, crashed=True))

    def _done(self, call: Call, future: Future[Any]) -> None:
        error: BaseException | None
        try:
            value, error = future.result(), None
        except BaseException as raised:  # noqa: BLE001 - the caller gets it, whatever it is
            value, error = None, raised
        self._end(call, value, error, broken=isinstance(error, BrokenExecutor))

    def _end(self, call: Call, value: Any, error: BaseException | None, *, broken: bool) -> None:
        if broken:
            error = _crash(call, error)
        elif error is not None:
            error = presentable(error)
        with self._lock:
            told = self.killed
            if not told:
                call.value, call.error = value, error
            self._call = None
            self.deadline = None
        host = self._backend.host
        host.call_ended(self, call, None, retiring=broken)
        if not told:
            call.wake_from_anywhere()
        if self.leaving:
            host.housekeeper.post(partial(self._leave, crashed=broken))

    def kill(self, error: Callable[[], BaseException]) -> None:
        """See ``Worker.kill``: the caller is told, the function runs on to its end."""
        with self._lock:
            call = self._call
            if call is not None:
                if self.killed:
                    return
                call.error = error()
                self.killed = True
        if call is None:  # its caller was interrupted before the call was here
            self._backend.host.housekeeper.post(partial(self._leave, crashed=False))
            return
        call.wake_from_anywhere()

    def retire(self) -> None:
        """See ``Worker.retire``."""
        self._leave(crashed=False)

    def _leave(self, *, crashed: bool) -> None:
        # Two ways may lead here at once: the end of a call, and retire().
        if self._left or self._call is not None:
            return
        self._left = True
        self._backend.forget(self, broken=crashed)
        self._backend.host.worker_gone(self.slot, crashed=crashed)
        if crashed:
            self._backend.abandon_executor(self.executor)


class ExecutorClassBackend(Backend):
    """The adapter; ``adapt`` makes a subclass for a given executor class."""

    executor_class: ClassVar[type[Executor]]

    @classmethod
    def option_names(cls) -> frozenset[str] | None:
        """The keyword arguments of the executor class but ``max_workers``."""
        parameters = inspect.signature(cls.executor_class).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        return frozenset(parameter.name for parameter in parameters) - {"max_workers"}

    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        known = self.option_names()
        for option in options:
            if known is not None and option not in known:
                raise TypeError(
                    f"The backend {self.name!r} has no option {option!r}. It has: "
                    f"{', '.join(sorted(known)) or 'none'}."
                )
        self._config = config
        self._options = dict(options)
        self._executors: dict[Pool, Executor] = {}
        self._users: dict[Executor, int] = {}
        self._workers: dict[ExecutorWorker, None] = {}
        self.host: Host

    def encode(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        listener: Listener | None = None,  # noqa: ARG002 - of subclasses
    ) -> _Payload:
        """Refuse what no executor can run; nothing is copied."""
        if not callable(function):
            raise TypeError(f"A function is needed, not {type(function).__name__}.")
        inner = getattr(function, "func", function)  # functools.partial
        for code in (function, getattr(type(inner), "__call__", None)):  # noqa: B004 - itself
            if inspect.iscoroutinefunction(inspect.unwrap(code)):  # type: ignore[arg-type]
                name = getattr(inner, "__qualname__", type(inner).__qualname__)
                raise TypeError(
                    f"{name} is a coroutine function; a worker runs plain functions. Await it on "
                    "your own event loop, or send a plain function."
                )
        return function, args, kwargs

    def open(self, host: Host) -> None:
        """See ``Backend.open``."""
        self.host = host

    def start_worker(self, slot: Slot) -> None:
        """Make the pool's executor if need be, and see that it runs something."""
        executor = self._executors.get(slot.pool)
        try:
            if executor is None:
                executor = self.executor_class(
                    max_workers=self._config.workers_per_pool,  # type: ignore[call-arg]
                    **self._options,
                )
                self._executors[slot.pool] = executor
                self._users[executor] = 0
            self._users[executor] += 1
            probe = executor.submit(os.getpid)
        except Exception as error:  # noqa: BLE001 - reported as a start that failed
            self._start_failed(slot, executor, error)
            return
        post = self.host.housekeeper.post
        probe.add_done_callback(lambda done: post(partial(self._probed, slot, executor, done)))

    def _probed(self, slot: Slot, executor: Executor, probe: Future[int]) -> None:
        if probe.cancelled() or executor not in self._users:
            return  # closed meanwhile
        error = probe.exception()
        if error is not None:
            self._start_failed(slot, executor, error)
        else:
            worker = ExecutorWorker(self, slot, executor)
            self._workers[worker] = None
            self.host.worker_ready(slot, worker)

    def _start_failed(self, slot: Slot, executor: Executor | None, error: BaseException) -> None:
        if executor is not None:
            self._release(slot.pool, executor, broken=True)
        failure = WorkerStartError(
            f"A worker of the backend {self.name!r} could not be started: "
            f"{type(error).__name__}: {error}",
            traceback_text="".join(traceback.format_exception(error)),
        )
        failure.__cause__ = error
        self.host.start_failed(slot, failure)

    def forget(self, worker: ExecutorWorker, *, broken: bool) -> None:
        """A worker has left; the last one takes its executor along."""
        self._workers.pop(worker, None)
        self._release(worker.slot.pool, worker.executor, broken=broken)

    def abandon_executor(self, executor: Executor) -> None:
        """Let the idle workers of a broken executor leave it too."""
        for worker in [worker for worker in self._workers if worker.executor is executor]:
            worker.retire()  # a call that runs hears of it by itself

    def _release(self, pool: Pool, executor: Executor, *, broken: bool) -> None:
        self._users[executor] = users = self._users.get(executor, 1) - 1
        if broken and self._executors.get(pool) is executor:
            del self._executors[pool]  # the next worker of the pool gets a new one
        if users <= 0:
            if self._executors.get(pool) is executor:
                del self._executors[pool]
            self._users.pop(executor, None)
            executor.shutdown(wait=False)

    def close(self) -> None:
        """Shut every executor down; a function that still runs ends by itself."""
        executors = list(self._users)
        self._users.clear()
        self._workers.clear()
        self._executors.clear()
        for executor in executors:
            executor.shutdown(wait=False, cancel_futures=True)

    def discard(self) -> None:
        """Forget the parent's executors."""
        self._executors.clear()
        self._workers.clear()
        self._users.clear()


class ThreadBackend(ExecutorClassBackend):
    """Threads of this process: no isolation, no parallel Python, but nothing needs pickling.

    A call runs in a copy of its caller's context. ``context`` and ``hooks`` mean what they mean for
    ``process``; the other options are those of ``ThreadPoolExecutor``.
    """

    name = "thread"
    executor_class = ThreadPoolExecutor
    supports_hooks = True
    supports_progress = True

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """See ``Backend.option_names``."""
        return frozenset({"context", "hooks", "initializer", "initargs", "thread_name_prefix"})

    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        super().__init__(config, options)
        for name in ("context", "hooks"):
            self._options.pop(name, None)
        hooks, context = checked_hooks(options), checked_paths("context", options)
        self._hooks = importlib.import_module(hooks) if hooks is not None else None
        self._carriers = Carriers(context) if context else None

    def encode(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        listener: Listener | None = None,
    ) -> _Payload:
        """See ``ExecutorClassBackend.encode``; the caller's context goes along."""
        super().encode(function, args, kwargs, listener=listener)
        if listener is not None:
            function = partial(reporting, listener.hear_from_anywhere, function)
        context = contextvars.copy_context()
        if reports():  # the caller is a call itself, to which somebody else may listen
            context.run(report_nothing)
        run = context.run
        if self._hooks is None and self._carriers is None:
            return run, (function, *args), kwargs
        captured = self._hooks.capture() if self._hooks is not None else None
        values = self._carriers.capture() if self._carriers is not None else ()
        return run, (self._run, captured, values, function, args, kwargs), {}

    def _run(
        self, captured: Any, values: Any, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self._carriers is not None:
            self._carriers.apply(values)
        if self._hooks is None:
            return function(*args, **kwargs)
        self._hooks.enter(captured)
        try:
            return function(*args, **kwargs)
        finally:
            self._hooks.leave()


@cache
def adapt(executor_class: type[Executor]) -> type[Backend]:
    """Return the backend for an executor class."""
    path = f"{executor_class.__module__}.{executor_class.__qualname__}"
    return type(
        f"{executor_class.__name__}Backend",
        (ExecutorClassBackend,),
        {"name": path, "executor_class": executor_class, "__doc__": f"Backend over ``{path}``."},
    )


def presentable(error: BaseException) -> BaseException:
    """``error``, or a ``RemoteError`` in its place if it would end or confuse the caller's loop."""
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    name = type(error).__qualname__
    if type(error).__module__ != "builtins":
        name = f"{type(error).__module__}.{name}"
    stand_in = RemoteError(
        f"The function raised {name}: {error}",
        type_name=name,
        text=str(error),
        traceback_text="".join(traceback.format_exception(error)),
    )
    stand_in.__cause__ = error if isinstance(error, Exception) else None
    return stand_in.with_traceback(error.__traceback__)


def _crash(call: Call, error: BaseException | None) -> WorkerCrashedError:
    crash = WorkerCrashedError(
        f"The executor of this pool broke ({type(error).__name__}: {error}); it has been replaced. "
        "With this backend a crash costs every call of the pool; the 'process' backend loses only "
        "the one.",
        function=call.function_name,
    )
    crash.__cause__ = error
    return crash
