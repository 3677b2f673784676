"""The ``dask`` backend: workers on the machines of a Dask cluster (https://distributed.dask.org).

A worker is a seat in one of Dask's worker processes, see ``dask_host``, and a call is a message
there, by ``Client.run``: never a task of Dask's, which it would run again when a machine is lost.
One thread has the event loop of the client and does all that is said to the cluster. What comes of
a call is decoded on that thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..engine.config import duration
from ..engine.line import Call
from ..exceptions import UnsupportedBackendError, WorkerCrashedError, WorkerStartError
from . import dask_host
from .base import Backend, Host, Worker
from .dask_host import CANCELLED, FAILED, FULL, SETTINGS, SILENT_SECONDS, Spec
from .process import wire
from .process.encoding import Encoder
from .process.options import OPTIONS, make_setup
from .process.outcomes import decode
from .process.shared import Payload

try:
    from distributed import Client
except ImportError as error:
    raise UnsupportedBackendError(
        "The backend 'dask' needs the package 'distributed': pip install 'leasepool-django[dask]'."
    ) from error

if TYPE_CHECKING:
    from ..engine.config import ManagerConfig
    from ..engine.line import Slot

__all__ = ["DaskBackend"]

OWN_OPTIONS = frozenset({"address", "connect_timeout", "security"})
# Between two signs of life; some may be lost before the other side takes this process for gone.
_BEAT_SECONDS = SILENT_SECONDS / 6
_CLOSE_SECONDS = 5.0
_PERFORM = f"{dask_host.__name__}.{dask_host.perform.__qualname__}"


class _Cluster:
    """The client of a cluster, and the thread that has its event loop.

    ``lost``: called on that thread with the address of a worker of Dask's that is gone.
    """

    def __init__(
        self,
        name: str,
        address: str | None,
        connect_timeout: float,
        security: Any,
        lost: Callable[[str], None],
    ) -> None:
        self._address = address
        self._connect_timeout = connect_timeout
        self._security = security
        self._lost = lost
        self.token = uuid.uuid4().hex
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._seats: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._asked: set[str] = set()  # where there may be one
        self._ended = False
        self._beating: asyncio.Task[None] | None = None
        # A plain one: what is started by this process must not depend on a policy of the user's.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._serve, name=f"{name}-dask", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Have ``work`` done on the thread; ``RuntimeError`` once it has ended."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise

    async def take_seat(self, spec: Spec) -> str:
        """Take a seat and give the address of its host; ``WorkerStartError`` if there is none."""
        client = await self._connected()
        try:
            listed = (await client.scheduler.identity(n_workers=-1))["workers"]
        except Exception as error:
            raise WorkerStartError(
                f"Dask's scheduler does not answer: {type(error).__name__}: {error}"
            ) from error
        # Those with few of ours first, and of these the ones where no start has failed.
        addresses: list[str] = sorted(listed, key=lambda a: (self._seats[a], self._failures[a]))
        for address in addresses:
            if self._ended:
                break
            self._asked.add(address)
            match await self._say(address, dask_host.take_seat, self.token, spec):
                case ():
                    self._seats[address] += 1
                    if self._beating is None:
                        self._beating = asyncio.create_task(self._beat())
                    return address
                case (status,) if status == FULL:
                    continue
                case (status, WorkerStartError() as failure) if status == FAILED:
                    self._failures[address] += 1
                    raise failure
                case trouble:
                    self._failures[address] += 1
                    raise WorkerStartError(
                        f"No worker could be had of Dask's at {address}: {_told(trouble)}"
                    )
        threads = sum(worker["nthreads"] for worker in listed.values())
        raise WorkerStartError(
            f"The cluster has no seat left: its {len(listed)} workers have {threads} threads in "
            "all, each good for one of WORKERS_PER_POOL, of all servers together."
        )

    async def call(self, address: str, number: int, frame: tuple[Any, ...]) -> Any:
        """Run a call there; what ``dask_host.call`` says, or the error that it was lost with."""
        return await self._say(address, dask_host.call, self.token, number, frame)

    async def cancel(self, address: str, number: int) -> None:
        """Stop it. Returns when it has stopped, or is lost anyway."""
        await self._say(address, dask_host.cancel, self.token, number)

    async def give_back(self, address: str) -> None:
        """Give a seat back that is not used."""
        if self._seats[address]:
            self._seats[address] -= 1
            await self._say(address, dask_host.give_back, self.token)

    async def leave(self) -> None:
        """Give all back, and let go of the client."""
        self._ended = True
        if self._beating is not None:
            self._beating.cancel()
        self._seats.clear()
        await asyncio.gather(
            *(self._say(address, dask_host.leave, self.token) for address in self._asked)
        )
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def end(self) -> None:
        """``leave``, within a few seconds, and end the thread."""
        try:
            self.do(asyncio.wait_for(self.leave(), _CLOSE_SECONDS)).exception(_CLOSE_SECONDS + 1)
        except TimeoutError:
            pass  # the others find that nothing is said any more
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is not None and self._client.status == "running":
                return self._client
            if self._client is not None:  # the scheduler was lost, and all seats with it
                client, self._client = self._client, None
                await client.close()
            try:
                self._client = await Client(
                    self._address,
                    asynchronous=True,
                    set_as_default=False,
                    timeout=self._connect_timeout,
                    security=self._security,
                )
            except Exception as error:
                where = f" at {self._address}" if self._address else ""
                raise WorkerStartError(
                    f"Dask's scheduler{where} cannot be reached within {self._connect_timeout:g} "
                    f"s: {type(error).__name__}: {error}"
                ) from error
            return self._client

    async def _say(self, address: str, function: Any, *arguments: Any) -> Any:
        """Call ``function`` on the event loop of a worker of Dask's; an error is returned."""
        client = self._client
        if client is None:
            return ConnectionError("There is no connection to Dask's scheduler.")
        try:
            said = await client.run(function, *arguments, workers=[address], on_error="return")
            return said[address]
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return ConnectionError(f"Dask's client gave it up: {error}")  # as it was closed
        except Exception as error:  # noqa: BLE001 - whatever it is, the call is lost
            return error

    async def _beat(self) -> None:
        """Say that this process is there, and notice which hosts are not."""
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            addresses = [address for address in self._seats if self._seats[address]]
            await asyncio.gather(*(self._look_after(address) for address in addresses))

    async def _look_after(self, address: str) -> None:
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                there = await self._say(address, dask_host.beat, self.token)
        except TimeoutError:
            there = False
        if there is not True:
            self._seats[address] = 0
            self._asked.discard(address)
            self._lost(address)


class DaskWorker(Worker):
    """One seat on the cluster."""

    def __init__(self, backend: DaskBackend, slot: Slot, address: str) -> None:
        self.slot = slot
        self.address = address
        self._backend = backend
        self._lock = threading.Lock()  # guards who sets the call's outcome: its end or kill()
        self._call: Call | None = None
        self._number = 0
        self._lost = False  # its host is gone
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
        self._call = call
        self._number = next(backend.numbers)
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
                return False
            future = backend.cluster.do(
                backend.cluster.call(self.address, self._number, backend.frame(call.payload))
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
        lost = False
        match said:
            case (int(kind), bytes(body)):
                decode(outcome, kind, body, None)
            case (status, error) if status == FAILED:
                outcome.error = _named(error, call)
                if isinstance(error, WorkerCrashedError):
                    lost = True
                    self._crashed = error
            case (status,) if status == CANCELLED:
                pass  # kill() has told the caller
            case error:
                lost = True
                outcome.error = self._crash(call, error)
        with self._lock:
            told = self.killed
            if not told:
                call.value, call.error = outcome.value, outcome.error
            self._call = None
            self.deadline = None
        host = self._backend.host
        host.call_ended(self, call, None, retiring=lost)
        if not told:
            call.wake_from_anywhere()
        if self.leaving or lost:
            host.housekeeper.post(partial(self._leave, crashed=lost))

    def _crash(self, call: Call, error: object) -> WorkerCrashedError:
        why = f"; {type(error).__name__}: {error}" if error is not None else ""
        return WorkerCrashedError(
            f"The worker of Dask at {self.address} that ran {call.function_name} was lost{why}. "
            "The call was not repeated.",
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
        self._backend.cluster.do(self._backend.cluster.cancel(self.address, self._number))
        call.wake_from_anywhere()

    def ending(self) -> tuple[str, dict[str, Any]]:
        """See ``Worker.ending``."""
        error = self._crashed
        if error is None:
            return f": Dask's worker at {self.address} was lost", {}
        if error.signal_name is not None:
            how = f"was killed by {error.signal_name}"
        else:
            how = f"exited with status {error.exitcode}"
        facts = {"exitcode": error.exitcode, "signal_name": error.signal_name}
        return f": it {how}, at {self.address}", facts

    def host_lost(self) -> None:
        """Housekeeper: its host is gone. A call that it runs hears of that by itself."""
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
        self._backend.forget(self)
        self._backend.host.worker_gone(self.slot, crashed=crashed)


def _told(trouble: Any) -> str:
    """What a host said that should not have, or what came instead."""
    match trouble:
        case (_, Exception() as error) | (Exception() as error):
            return f"{type(error).__name__}: {error}"
    return repr(trouble)


def _named(error: Exception, call: Call) -> Exception:
    """``error`` of a worker, which knows only that it ran ``perform``."""
    if not isinstance(error, WorkerCrashedError):
        return error
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
        duration("start_timeout", options.get("start_timeout", 60.0))
        Encoder.__init__(self, setup.hooks, setup.context)
        self.main_importable = False  # by the workers, whose main module is another
        for_workers.pop("context", None)  # applied by perform()
        self._per_call = (setup.hooks, setup.context)
        self._spec = Spec(config.name_prefix, None, for_workers)
        self._connection = (
            config.name_prefix,
            address,
            duration("connect_timeout", options.get("connect_timeout", 10.0)),
            options.get("security"),
        )
        self.numbers = itertools.count()
        self.cluster: _Cluster
        self._workers: dict[DaskWorker, None] = {}
        self._open = False
        self.host: Host

    def frame(self, payload: bytes | Payload) -> tuple[Any, ...]:
        """The arguments of ``dask_host.perform``."""
        if isinstance(payload, Payload):
            whole = b"".join(payload.frame(wire.RESULT_PARTS))
            return wire.RESULT_PARTS, whole[wire.HEADER_SIZE :], *self._per_call
        return wire.RESULT, payload[wire.HEADER_SIZE :], *self._per_call

    def open(self, host: Host) -> None:
        """See ``Backend.open``."""
        self.host = host
        if self._spec.options.get("hooks") is not None:
            self._spec = self._spec._replace(settings=os.environ.get(SETTINGS))
        self.cluster = _Cluster(
            *self._connection, lambda a: host.housekeeper.post(self._lost_of(a))
        )
        self._open = True

    def _lost_of(self, address: str) -> Callable[[], None]:
        def tell() -> None:
            for worker in [worker for worker in self._workers if worker.address == address]:
                worker.host_lost()

        return tell

    def start_worker(self, slot: Slot) -> None:
        """See ``Backend.start_worker``."""
        taken = self.cluster.do(self.cluster.take_seat(self._spec))
        post = self.host.housekeeper.post
        taken.add_done_callback(lambda done: post(partial(self._seated, slot, done)))

    def _seated(self, slot: Slot, taken: Future[str]) -> None:
        if taken.cancelled() or not self._open:
            return  # closed meanwhile
        error = taken.exception()
        if error is None:
            worker = DaskWorker(self, slot, taken.result())
            self._workers[worker] = None
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

    def forget(self, worker: DaskWorker) -> None:
        """Housekeeper: a worker has left."""
        if self._workers.pop(worker, self) is None and self._open:
            self.cluster.do(self.cluster.give_back(worker.address))

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
