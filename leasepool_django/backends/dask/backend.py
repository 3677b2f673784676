"""The engine's side of the ``dask`` backend: workers that are seats on a cluster.

What comes of a call is decoded on the cluster's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from distributed import Security

from ...engine.config import duration
from ...engine.line import Call
from ...exceptions import WorkerCrashedError, WorkerStartError
from ..base import Backend, Host, Worker
from ..process import wire
from ..process.encoding import Encoder
from ..process.options import OPTIONS, make_setup
from ..process.outcomes import decode
from ..process.shared import Payload
from . import host
from .cluster import Cluster, Seat
from .host import CANCELLED, FAILED, SETTINGS, Spec

if TYPE_CHECKING:
    from ...engine.config import ManagerConfig
    from ...engine.line import Slot

__all__ = ["DaskBackend"]

OWN_OPTIONS = frozenset({"address", "connect_timeout", "security"})
_PERFORM = f"{host.__name__}.{host.perform.__qualname__}"


class DaskWorker(Worker):
    """One seat on the cluster."""

    def __init__(self, backend: DaskBackend, slot: Slot, seat: Seat) -> None:
        self.slot = slot
        self.seat = seat
        self._backend = backend
        self._lock = threading.Lock()  # guards who sets the call's outcome: its end or kill()
        self._call: Call | None = None
        self._number = 0
        self._lost = False  # the seat is no longer there
        self._crashed: WorkerCrashedError | None = None
        self._left = False  # set by the housekeeper

    def begin(
        self,
        call: Call,
        home: asyncio.AbstractEventLoop,  # noqa: ARG002 - the contract's
        *,
        eager: bool,  # noqa: ARG002 - the contract's
    ) -> None:
        """See ``Worker.begin``."""
        self._send(call)

    def run_blocking(self, call: Call) -> None:
        """See ``Worker.run_blocking``."""
        if self._send(call):
            assert call.wakeup is not None
            call.wakeup.acquire()

    def _send(self, call: Call) -> bool:
        """Have the call run on the cluster; false if it was given to another worker."""
        backend = self._backend
        call.begun = monotonic()
        self._number = next(backend.numbers)  # before kill() can see the call
        self._call = call
        if call.timeout is not None:
            self.deadline = call.begun + call.timeout
            backend.host.housekeeper.wake_by(self.deadline)
        try:
            if self._left or self._lost:
                self._call = None
                self.deadline = None
                if not backend.host.call_undelivered(self, call, suspect=False):
                    call.error = self._crash(call, None)
                    call.wake_from_anywhere()
                backend.host.housekeeper.post(partial(self._leave, crashed=True))
                return False
            future = backend.cluster.do(
                backend.cluster.call(self.seat, self._number, backend.frame(call.payload))
            )
            call.payload = None
            future.add_done_callback(partial(self._done, call))
        except BaseException:
            # A signal handler's. Whether the call's end will be told nobody knows: kill() must not
            # wait for it.
            self._call = None
            raise
        return True

    def _done(self, call: Call, future: Future[Any]) -> None:
        """On the cluster's thread: the call has ended, in one way or another."""
        said: Any
        try:
            said = future.result()
        except BaseException as error:  # noqa: BLE001 - the call is lost, whatever it is
            said = error
        outcome = Call(None, call.function, None, None)
        lost = retiring = False
        match said:
            case (int(kind), bytes(body), bool(retiring)):
                decode(outcome, kind, body, None)
            case (status, WorkerCrashedError() as crash) if status == FAILED:
                lost = True
                self._crashed = crash
                outcome.error = _named(crash, call)
            case (status, refusal) if status == FAILED:
                outcome.error = refusal
            case (status,) if status == CANCELLED and self.killed:
                pass  # the caller has been told
            case trouble:
                lost = True
                outcome.error = self._crash(call, trouble)
        with self._lock:
            told = self.killed
            if not told:
                call.value, call.error = outcome.value, outcome.error
            self._call = None
            self.deadline = None
        lost = lost or self._lost  # after the call is let go: seat_lost() looks the other way round
        host = self._backend.host
        host.call_ended(self, call, None, retiring=lost or retiring)
        if not told:
            call.wake_from_anywhere()
        if self.leaving or lost or retiring:
            host.housekeeper.post(partial(self._leave, crashed=lost and not told))

    def _crash(self, call: Call, trouble: object) -> WorkerCrashedError:
        if isinstance(trouble, (asyncio.CancelledError, CancelledError)):
            why = "; nothing is heard of it any more"
        else:
            told = isinstance(trouble, Exception)
            why = f"; {type(trouble).__name__}: {trouble}" if told else ""
        return WorkerCrashedError(
            f"The worker of Dask at {self.seat.address} that ran {call.function_name} was "
            f"lost{why}. The call was not repeated.",
            function=call.function_name,
        )

    def kill(self, error: Callable[[], BaseException]) -> None:
        """See ``Worker.kill``: the caller is told, and the call stopped on its machine."""
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
        cluster = self._backend.cluster
        cluster.do(cluster.cancel(self.seat, self._number))
        call.wake_from_anywhere()

    def ending(self) -> tuple[str, dict[str, Any]]:
        """See ``Worker.ending``."""
        error = self._crashed
        if error is None:
            return f": Dask's worker at {self.seat.address} was lost", {}
        if error.signal_name is not None:
            how = f"was killed by {error.signal_name}"
        else:
            how = f"exited with status {error.exitcode}"
        facts = {"exitcode": error.exitcode, "signal_name": error.signal_name}
        return f": it {how}, at {self.seat.address}", facts

    def seat_lost(self) -> None:
        """Housekeeper: its seat is gone. The call that runs, if there is one, is given up."""
        self._lost = True
        self._leave(crashed=True)

    def retire(self) -> None:
        """See ``Worker.retire``."""
        self._leave(crashed=False)

    def _leave(self, *, crashed: bool) -> None:
        # Two ways may lead here at once: the end of a call, and retire().
        if self._left or self._call is not None:
            return
        self._left = True
        self._backend.give_back(self, partial(self._gone, crashed=crashed))

    def _gone(self, *, crashed: bool) -> None:
        self._backend.host.worker_gone(self.slot, crashed=crashed)


def _named(error: WorkerCrashedError, call: Call) -> WorkerCrashedError:
    """``error`` of a worker, which knows only that it ran ``perform``."""
    return WorkerCrashedError(
        str(error).replace(_PERFORM, call.function_name),
        pid=error.pid,
        exitcode=error.exitcode,
        signal_name=error.signal_name,
        function=call.function_name,
    )


class DaskBackend(Encoder, Backend):
    """Workers on a Dask cluster.

    ``address``: of the scheduler, such as ``"tcp://10.0.0.5:8786"``; without it, what Dask's own
    configuration says. ``connect_timeout``: seconds. ``security``: a ``distributed.Security``. The
    other options are those of ``process``, which the workers on the cluster are.
    """

    name = "dask"
    supports_kill = True
    supports_isolation = True
    supports_hooks = True
    on_this_machine = False

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """See ``Backend.option_names``."""
        return OPTIONS | OWN_OPTIONS

    def __init__(self, config: ManagerConfig, options: Mapping[str, Any]) -> None:
        for option in options:
            if option not in self.option_names():
                raise TypeError(
                    f"The backend 'dask' has no option {option!r}. It has: "
                    f"{', '.join(sorted(self.option_names()))}."
                )
        address = options.get("address")
        if address is not None and not isinstance(address, str):
            raise TypeError(f"address must be a string, not {address!r}.")
        for_workers = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
        setup = make_setup(config, for_workers)  # judges them
        security = options.get("security")
        if not isinstance(security, (Security, dict, type(None))):
            # Not its value, which may be secret.
            kind = type(security).__name__
            raise TypeError(f"security must be a distributed.Security, not of type {kind}.")
        Encoder.__init__(self, setup.hooks, setup.context)
        self.main_importable = False  # by the workers, whose main module is another
        for_workers.pop("context", None)  # applied by perform()
        self._per_call = (setup.hooks, setup.context)
        self._spec = Spec(config.name_prefix, None, for_workers)
        self._connection = (
            config.name_prefix,
            address,
            duration("connect_timeout", options.get("connect_timeout", 10.0)),
            duration("start_timeout", options.get("start_timeout", 60.0)),
            security,
            config.max_pools * config.workers_per_pool,
        )
        self.numbers = itertools.count()
        self.cluster: Cluster
        self._workers: dict[Seat, DaskWorker] = {}
        self._open = False
        self.host: Host

    def frame(self, payload: bytes | Payload) -> tuple[Any, ...]:
        """The arguments of ``host.perform``."""
        if isinstance(payload, Payload):
            whole = b"".join(payload.frame(wire.RESULT_PARTS))
            return wire.RESULT_PARTS, whole[wire.HEADER_SIZE :], *self._per_call
        return wire.RESULT, payload[wire.HEADER_SIZE :], *self._per_call

    def open(self, host: Host) -> None:
        """See ``Backend.open``."""
        self.host = host
        if self._spec.options.get("hooks") is not None:
            self._spec = self._spec._replace(settings=os.environ.get(SETTINGS))
        post = host.housekeeper.post
        self.cluster = Cluster(*self._connection, lambda seat: post(partial(self._lost, seat)))
        self._open = True

    def _lost(self, seat: Seat) -> None:
        worker = self._workers.get(seat)
        if worker is not None:
            worker.seat_lost()

    def start_worker(self, slot: Slot) -> None:
        """See ``Backend.start_worker``."""
        taken = self.cluster.do(self.cluster.take_seat(self._spec))
        post = self.host.housekeeper.post
        taken.add_done_callback(lambda done: post(partial(self._seated, slot, done)))

    def _seated(self, slot: Slot, taken: Future[Seat]) -> None:
        if taken.cancelled() or not self._open:
            return  # closed meanwhile
        error = taken.exception()
        if error is None:
            worker = DaskWorker(self, slot, taken.result())
            self._workers[worker.seat] = worker
            self.host.worker_ready(slot, worker)
            return
        if not isinstance(error, WorkerStartError):
            text = "".join(traceback.format_exception(error))
            failure = WorkerStartError(
                f"A worker of the backend 'dask' could not be started: {type(error).__name__}: "
                f"{error}",
                traceback_text=text,
            )
            failure.__cause__ = error
            error = failure
        self.host.start_failed(slot, error)

    def give_back(self, worker: DaskWorker, then: Callable[[], None]) -> None:
        """Housekeeper: a worker leaves; ``then`` is called, here, when its seat is free again."""
        if not self._open:
            return
        post = self.host.housekeeper.post

        def gone() -> None:
            if self._open and self._workers.pop(worker.seat, None) is not None:
                then()

        given = self.cluster.do(self.cluster.give_back(worker.seat))
        given.add_done_callback(lambda _: post(gone))

    def live_workers(self) -> int:
        """See ``Backend.live_workers``."""
        return len(self._workers)

    def close(self) -> None:
        """See ``Backend.close``."""
        if self._open:
            self._open = False
            self._workers.clear()
            self.cluster.end()

    def discard(self) -> None:
        """See ``Backend.discard``."""
        self._open = False
        self._workers.clear()
