"""The contract between the engine and what its pools are made of.

The engine decides who may use which worker and when; a backend starts workers, runs one call at a
time on each, and ends them. A backend never decides who is next: it asks ``Host.call_ended``.
Backends differ in what the ``supports_*`` flags say; callers and tests read those instead of
asking for a class.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..exceptions import UnsupportedBackendError

if TYPE_CHECKING:
    import asyncio

    from ..engine.config import ManagerConfig
    from ..engine.events import Event
    from ..engine.housekeeper import Housekeeper
    from ..engine.line import Call, Slot
    from ..engine.progress import Listener

__all__ = ["BUILT_IN", "Backend", "Host", "Worker", "resolve"]

BUILT_IN = {
    "process": "leasepool_django.backends.process.ProcessBackend",
    "thread": "leasepool_django.backends.executor.ThreadBackend",
    "inline": "leasepool_django.backends.inline.InlineBackend",
    "dask": "leasepool_django.backends.dask.DaskBackend",
}


class Host(Protocol):
    """What a backend may ask of the engine. Thread-safe where it says so."""

    housekeeper: Housekeeper

    def call_ended(
        self,
        worker: Worker,
        call: Call,
        home: asyncio.AbstractEventLoop | None,
        *,
        retiring: bool,
        takes_ahead: bool = False,
    ) -> Call | None:
        """Any thread: ``worker`` has finished ``call``.

        Returns the next call to begin on this worker now, if its home is ``home``; a call with
        another home is passed to it. One whose ``ahead`` is ``worker`` has been sent already and
        must not be sent again. ``retiring``: the worker is leaving and takes no other call;
        ``takes_ahead``: it takes the one that was sent ahead to it, by itself.
        """

    def look_ahead(self, worker: Worker, home: asyncio.AbstractEventLoop) -> None:
        """On ``home``'s thread: ``worker`` has begun a call; another may be sent to it ahead."""

    def worker_dead(self, worker: Worker) -> None:
        """Any thread: the worker has ended; a call it was sent ahead and did not take is free."""

    def call_undelivered(self, worker: Worker, call: Call, *, suspect: bool = True) -> bool:
        """Any thread: ``worker`` was dead before it received ``call``, which may go to another.

        False if that has happened too often: the worker gives ``call`` its error.
        ``suspect``: whether the worker may have died of receiving it.
        """

    def worker_ready(self, slot: Slot, worker: Worker) -> None:
        """Housekeeper: ``worker`` can take calls."""

    def worker_gone(self, slot: Slot, *, crashed: bool) -> None:
        """Housekeeper: the slot's worker has ended, and the kernel says so."""

    def start_failed(self, slot: Slot, error: BaseException) -> None:
        """Housekeeper: the slot's worker could not be started; no process of it is left."""

    def tell(self, event: Event) -> None:
        """Any thread: log an event and tell subscribers."""

    def hand_over(self, job: Callable[[], None]) -> None:
        """Any thread: run user code, or what takes long, on the notifier's thread. No lock."""


class Worker(ABC):
    """One worker that is ready: runs one call at a time for whoever holds its slot."""

    slot: Slot
    pid: int | None = None
    calls = 0
    # Set before the worker is ended: it takes no further call. Guarded by the dispatcher's lock.
    leaving = False
    killed = False  # whether the engine ended it with kill()
    # The call it was sent before its turn has come. Guarded by the dispatcher's lock.
    ahead: Call | None = None
    # When the running call must have ended (monotonic). Written by whoever drives the worker.
    deadline: float | None = None

    @abstractmethod
    def begin(self, call: Call, home: asyncio.AbstractEventLoop, *, eager: bool) -> None:
        """Start ``call`` without blocking, on ``home``'s thread; ``call.wake()`` when it is done.

        ``eager``: nobody waits, so an outcome that is there at once may be taken at once.
        """

    def may_put_ahead(self, call: Call) -> bool:  # noqa: ARG002 - for those that can
        """Whether ``call`` can be sent to this worker, which is busy, ahead of its turn.

        Under the dispatcher's lock, on the thread of the call's home, which is also the home of
        the call that runs.
        """
        return False

    def put_ahead(self, call: Call) -> bool:
        """Send it, likewise; false if the system refuses that."""
        raise NotImplementedError

    def take_back(self, taken: list[bytes]) -> None:  # noqa: B027 - for those that can
        """Take back what was sent ahead, into ``taken``, unless the worker has taken it.

        If so it has finished the call before, and sent all of its outcome. Under the dispatcher's
        lock. May be done again, after it was interrupted, with the same list.
        """

    def has_answered(self) -> bool:
        """Whether the function has ended, and the loop of its call has not read that yet.

        On any thread.
        """
        return False

    def ending(self) -> tuple[str, dict[str, Any]]:
        """How its process ended by itself: for the end of a sentence, and as facts."""
        return "", {}

    @abstractmethod
    def run_blocking(self, call: Call) -> None:
        """Run ``call`` in the calling thread's time; returns when its outcome is in ``call``."""

    @abstractmethod
    def kill(self, error: Callable[[], BaseException]) -> None:
        """End the running call now, from any thread; its caller gets ``error()``.

        Where ``supports_kill`` is false the caller is told, and the worker leaves when the
        function ends.
        """

    @abstractmethod
    def retire(self) -> None:
        """End the idle worker gently. Housekeeper; ``worker_gone`` follows."""


class Backend(ABC):
    """Starts workers for one manager.

    ``supports_kill``: a running call can be stopped; ``supports_isolation``: a crash in a call
    costs that call only, and arguments are copies; ``supports_log_forwarding``: worker log
    records reach this process; ``supports_hooks``: takes the ``hooks`` option;
    ``supports_prompt_deadlines``: a blocking caller hears at once that its call's time is over, and
    not when the function ends, which it runs itself; ``on_this_machine``: its workers use the
    cores here; ``supports_progress``: ``on_progress`` hears what functions report.
    """

    name: ClassVar[str]
    supports_kill: ClassVar[bool] = False
    supports_isolation: ClassVar[bool] = False
    supports_log_forwarding: ClassVar[bool] = False
    supports_hooks: ClassVar[bool] = False
    supports_prompt_deadlines: ClassVar[bool] = True
    on_this_machine: ClassVar[bool] = True
    supports_progress: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def option_names(cls) -> frozenset[str] | None:
        """The names of the constructor options; ``None`` if they cannot be known."""

    @abstractmethod
    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        """Check ``options``; start nothing. ``TypeError`` names an unknown option."""

    @abstractmethod
    def encode(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        listener: Listener | None = None,
    ) -> Any:
        """Return what to send for a call, or raise before anything is sent.

        ``listener`` hears what the function reports: only given where ``supports_progress``.
        """

    @abstractmethod
    def open(self, host: Host) -> None:
        """Start what all workers share. Housekeeper; must not block for long."""

    @abstractmethod
    def start_worker(self, slot: Slot) -> None:
        """Housekeeper: start a worker; ``worker_ready`` or ``start_failed`` follows."""

    @abstractmethod
    def close(self) -> None:
        """End what is left, workers included. Housekeeper; may take a few seconds."""

    @abstractmethod
    def discard(self) -> None:
        """After a fork, in the child: close copied descriptors, touch nothing shared."""

    def live_workers(self) -> int:
        """How many worker processes exist right now, starting and ending ones included."""
        return 0


def resolve(backend: Any) -> type[Backend]:
    """Return the backend class for a name, an ``ExecutorBackend`` member or a dotted path.

    A ``concurrent.futures.Executor`` class, or its dotted path, gives the adapter for that class.
    Raises ``UnsupportedBackendError`` with the reason for anything else.
    """
    if isinstance(backend, Enum):
        backend = backend.value
    target: Any = backend
    if isinstance(backend, str):
        path = BUILT_IN.get(backend, backend)
        module_name, _, attribute = path.rpartition(".")
        if not module_name:
            known = ", ".join(repr(name) for name in BUILT_IN)
            raise UnsupportedBackendError(
                f"There is no backend {backend!r}. Use {known}, or the dotted path of a "
                "concurrent.futures.Executor class."
            )
        try:
            target = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # the module is the user's, and may raise anything
            raise UnsupportedBackendError(
                f"The backend {backend!r} cannot be imported: {type(error).__name__}: {error}."
            ) from error
    if isinstance(target, type) and issubclass(target, (Backend, Executor)):
        # Executor has no mark of an abstract class; its submit() only raises.
        if getattr(target, "__abstractmethods__", None) or (
            issubclass(target, Executor) and target.submit is Executor.submit
        ):
            raise UnsupportedBackendError(
                f"The backend {backend!r} is an abstract class, which runs nothing. Use a class "
                "that does, such as concurrent.futures.ThreadPoolExecutor."
            )
        if issubclass(target, Backend):
            if not hasattr(target, "name"):
                raise UnsupportedBackendError(
                    f"The backend {backend!r} has no name, as one that others are made of. Use a "
                    "class made of it, or give it a class attribute `name`, a string."
                )
            return target
        from .executor import adapt

        return adapt(target)  # type: ignore[arg-type]  # a class is hashable
    raise UnsupportedBackendError(
        f"The backend {backend!r} is neither a backend nor a concurrent.futures.Executor class."
    )
