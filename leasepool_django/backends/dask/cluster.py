"""What a server says to a Dask cluster, on a thread of its own with an event loop of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

import dask.config
from distributed import Client

from ...exceptions import WorkerStartError
from . import host
from .host import FAILED, FULL, SILENT_SECONDS, Spec

__all__ = ["Cluster", "Seat"]

logger = logging.getLogger(__name__)

# Between two signs of life; some may be lost before one side takes the other for gone.
_BEAT_SECONDS = SILENT_SECONDS / 6
_HEAR_SECONDS = 3.0  # in which a host answers that does not hang
_CLOSE_SECONDS = 5.0
_CONNECTIONS = 64  # to the scheduler, beside those of the calls


class Seat(NamedTuple):
    """Where it is, and its number."""

    address: str
    number: int


class _Host:
    """A worker of Dask's, as far as this process has to do with it."""

    def __init__(self) -> None:
        self.seats: set[int] = set()  # that this process has, or has asked for
        self.taken: set[int] = set()  # of which the host knows
        self.heard = monotonic()
        self.calls: dict[int, asyncio.Task[Any]] = {}


class _SilentError(Exception):
    """A host does not answer."""


class Cluster:
    """The client of a cluster, and the thread that has its event loop.

    ``most_calls``: how many there may be at once. ``lost``: called on that thread with a seat that
    is no longer there.
    """

    def __init__(
        self,
        name: str,
        address: str | None,
        connect_timeout: float,
        start_timeout: float,
        security: Any,
        most_calls: int,
        lost: Callable[[Seat], None],
    ) -> None:
        self._address = address
        self._connect_timeout = connect_timeout
        self._start_timeout = start_timeout
        self._security = security
        self._lost = lost
        self._connections = _CONNECTIONS + most_calls  # each call that runs has one
        self.token = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._latest = 0
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._hosts: dict[str, _Host] = {}
        self._asked: set[str] = set()  # where there may be something of this process
        self._failures: Counter[str] = Counter()
        self._beating: asyncio.Task[None] | None = None
        self._ended = False
        self._silent = False  # whether it was logged that the scheduler says nothing
        # A plain one: what is started by this process must not depend on a policy of the user's.
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(_log_quietly)
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

    # -- seats -------------------------------------------------------------------------------------

    async def take_seat(self, spec: Spec) -> Seat:
        """Take a seat; ``WorkerStartError`` if there is none."""
        await self._connected()
        try:
            async with asyncio.timeout(self._connect_timeout):
                listed = await self._listed()
        except Exception as error:
            raise WorkerStartError(f"Dask's scheduler does not answer: {_told(error)}") from error
        if not listed:
            raise WorkerStartError("The Dask cluster has no workers.")
        silent: list[str] = []
        failures: list[WorkerStartError] = []
        left = set(listed)
        while left and not self._ended:
            # Those where no start has failed first, and of these the ones with few of ours.
            address = min(left, key=lambda a: (self._failures[a], self._count(a), a))
            left.remove(address)
            try:
                seat = await self._take_seat_at(address, spec)
            except _SilentError:
                silent.append(address)
            except WorkerStartError as failure:
                failures.append(failure)
            else:
                if seat is not None:
                    self._failures.pop(address, None)
                    return seat
                continue  # none left there
            self._failures[address] += 1
        if failures:
            raise failures[0]
        threads = sum(worker["nthreads"] for worker in listed.values())
        raise WorkerStartError(
            f"The cluster has no seat left: its {len(listed)} worker(s) have {threads} thread(s) "
            "in all, each good for one of WORKERS_PER_POOL, of all servers together."
            + (f" These do not answer: {', '.join(silent)}." if silent else "")
        )

    def _count(self, address: str) -> int:
        found = self._hosts.get(address)
        return len(found.seats) if found is not None else 0

    async def _take_seat_at(self, address: str, spec: Spec) -> Seat | None:
        """Take one there; ``None`` if none is left, ``_SilentError`` if it does not answer."""
        self._latest = number = next(self._numbers)
        at = self._hosts.setdefault(address, _Host())
        at.seats.add(number)
        self._asked.add(address)
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())
        taken = False
        try:
            said: Any
            if await self._within(_HEAR_SECONDS, address, host.beat, (), 0) is None:
                raise _SilentError
            if self._ended:
                return None
            try:
                async with asyncio.timeout(self._start_timeout):
                    said = await self._say(address, host.take_seat, number, spec)
            except TimeoutError:
                said = TimeoutError(f"no answer within {self._start_timeout:g} s (start_timeout)")
            match said:
                case ():
                    if number not in at.seats:  # taken for lost meanwhile
                        return None
                    taken = True
                    at.taken.add(number)
                    return Seat(address, number)
                case (status,) if status == FULL:
                    return None
                case (status, WorkerStartError() as failure) if status == FAILED:
                    raise failure
                case trouble:
                    raise WorkerStartError(
                        f"No worker could be had of Dask's at {address}: {_told(trouble)}"
                    )
        finally:
            if not taken:
                at.seats.discard(number)  # if it was taken there, the next beat frees it

    async def give_back(self, seat: Seat) -> None:
        """Give a seat back; what still runs there is stopped. Does not take long."""
        at = self._hosts.get(seat.address)
        if at is not None and seat.number in at.seats:
            at.seats.discard(seat.number)
            at.taken.discard(seat.number)
            # If this does not arrive, the next beat says it again.
            await self._within(_CLOSE_SECONDS, seat.address, host.give_back, seat.number)

    # -- calls -------------------------------------------------------------------------------------

    async def call(self, seat: Seat, number: int, frame: tuple[Any, ...]) -> Any:
        """Run a call there; what ``host.call`` says, or the error that it was lost with."""
        at = self._hosts.get(seat.address)
        task = asyncio.current_task()
        if at is None or task is None or seat.number not in at.seats:
            return (host.GONE,)
        at.calls[number] = task
        try:
            return await self._say(seat.address, host.call, seat.number, number, frame)
        finally:
            at.calls.pop(number, None)

    async def cancel(self, seat: Seat, number: int) -> None:
        """Stop it, or give it up where that cannot be said."""
        said = await self._within(_CLOSE_SECONDS, seat.address, host.cancel, seat.number, number)
        at = self._hosts.get(seat.address)
        task = at.calls.get(number) if at is not None else None
        if said is None and task is not None:
            task.cancel()

    # -- signs of life -----------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Say which seats this process has, and notice which are no longer there."""
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            if not self._hosts:
                continue
            try:
                async with asyncio.timeout(_HEAR_SECONDS):
                    listed: dict[str, Any] | None = await self._listed()
                self._silent = False
            except Exception as error:  # noqa: BLE001 - whatever it is, it may pass
                listed = None
                if not self._silent:
                    self._silent = True
                    logger.warning("Dask's scheduler does not answer: %s", _told(error))
            looks = (self._look_after(address, at, listed) for address, at in self._hosts.items())
            for failure in await asyncio.gather(*looks, return_exceptions=True):
                if isinstance(failure, Exception):
                    logger.error("A worker of Dask's cannot be looked after", exc_info=failure)

    async def _look_after(self, address: str, at: _Host, listed: dict[str, Any] | None) -> None:
        taken = set(at.taken)
        known: Any = None
        if listed is None or address in listed:
            seats = tuple(at.seats)
            known = await self._within(_HEAR_SECONDS, address, host.beat, seats, self._latest)
        if known is not None:
            at.heard = monotonic()
            for number in (taken & at.taken) - set(known):
                self._lose(address, at, number)
            if not at.seats and not at.calls and self._hosts.get(address) is at:
                del self._hosts[address]
        elif (listed is not None and address not in listed) or (
            monotonic() - at.heard > SILENT_SECONDS
        ):
            self._hosts.pop(address, None)
            for number in list(at.taken):
                self._lose(address, at, number)
            for task in list(at.calls.values()):
                task.cancel()
            at.seats.clear()
            at.taken.clear()

    def _lose(self, address: str, at: _Host, number: int) -> None:
        at.seats.discard(number)
        at.taken.discard(number)
        self._lost(Seat(address, number))

    # -- the connection ----------------------------------------------------------------------------

    async def _connected(self) -> None:
        async with self._connecting:
            if self._client is not None and self._client.status == "running":
                return
            if self._client is not None:  # the scheduler was lost
                client, self._client = self._client, None
                await client.close(_CLOSE_SECONDS)
            if self._address is None and dask.config.get("scheduler-address", None) is None:
                raise WorkerStartError(  # Dask would start a cluster in this process
                    "Which Dask cluster? Give the scheduler's address in OPTIONS['address'], or in "
                    "Dask's own configuration, as by DASK_SCHEDULER_ADDRESS."
                )
            where = f" at {self._address}" if self._address else ""
            client = None
            try:
                client = Client(
                    self._address,
                    asynchronous=True,
                    set_as_default=False,
                    timeout=self._connect_timeout,
                    security=self._security,
                    connection_limit=self._connections,
                )
                async with asyncio.timeout(self._connect_timeout):
                    await client
            except BaseException as error:
                if client is not None:
                    with suppress(Exception):  # it was never there
                        await client.close(0)
                if not isinstance(error, Exception):
                    raise
                if isinstance(error, OSError):  # a TimeoutError is one
                    how = f"cannot be reached within {self._connect_timeout:g} s"
                else:
                    how = "cannot be used"
                raise WorkerStartError(f"Dask's scheduler{where} {how}: {_told(error)}") from error
            self._client = client

    async def _listed(self) -> dict[str, Any]:
        """The cluster's present workers, by address; an error if the scheduler does not say."""
        if self._client is None:
            raise ConnectionError("There is no connection to Dask's scheduler.")
        identity = await self._client.scheduler.identity(n_workers=-1)
        listed: dict[str, Any] = identity["workers"]
        return listed

    async def _say(self, address: str, function: Any, *arguments: Any) -> Any:
        """Call ``function`` on the event loop of a worker of Dask's; an error is returned."""
        client = self._client
        if client is None:
            return ConnectionError("There is no connection to Dask's scheduler.")
        # One process may have several workers of Dask's.
        token = f"{self.token}@{address}"
        try:
            said = await client.run(
                function, token, *arguments, workers=[address], on_error="return"
            )
            return said[address]
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return ConnectionError(f"Dask's client gave it up: {error}")  # as it was closed
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller has to do without
            return error

    async def _within(self, seconds: float, address: str, function: Any, *arguments: Any) -> Any:
        """``_say``, within ``seconds``; ``None`` if there is no answer, or an error for one."""
        try:
            async with asyncio.timeout(seconds):
                said = await self._say(address, function, *arguments)
        except TimeoutError:
            return None
        return None if isinstance(said, BaseException) else said

    # -- the end -----------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Give all back, let go of the client, and end what is under way."""
        self._ended = True
        if self._beating is not None:
            self._beating.cancel()
        self._hosts = {}
        there = self._asked
        try:
            async with asyncio.timeout(_HEAR_SECONDS):
                there = there & set(await self._listed())
        except Exception as error:  # noqa: BLE001 - then each is tried
            logger.debug("Dask's scheduler does not answer: %s", _told(error))
        await asyncio.gather(*(self._within(_CLOSE_SECONDS, a, host.leave) for a in there))
        if self._client is not None:
            client, self._client = self._client, None
            await client.close(_CLOSE_SECONDS)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def end(self) -> None:
        """``leave``, and end the thread."""
        try:
            error = self.do(self.leave()).exception(3 * _CLOSE_SECONDS)
            if error is not None:
                logger.warning("Dask's client could not be closed: %s", _told(error))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)


def _log_quietly(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody asked for, as Dask's own tasks that end with the connection."""
    logger.debug("%s", context.get("message"), exc_info=context.get("exception"))


def _told(trouble: Any) -> str:
    """What a host said that should not have, or what came instead."""
    match trouble:
        case (_, Exception() as error) | (BaseException() as error):
            return f"{type(error).__name__}: {error}"
    return repr(trouble)
