"""What a server says to a Dask cluster, on a thread of its own with an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import dask.config
from distributed import Client

from ...exceptions import WorkerStartError
from . import host
from .host import FAILED, FULL, SILENT_SECONDS, Spec

__all__ = ["Cluster"]

logger = logging.getLogger(__name__)

# Between two signs of life; some may be lost before the other side takes this process for gone.
_BEAT_SECONDS = SILENT_SECONDS / 6
_CLOSE_SECONDS = 5.0


class Cluster:
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
        self._tasks: set[asyncio.Task[None]] = set()
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
        await self._connected()
        try:
            listed = await self._listed()
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
            match await self._say(address, host.take_seat, self.token, spec):
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
        """Run a call there; what ``host.call`` says, or the error that it was lost with."""
        said = await self._say(address, host.call, self.token, number, frame)
        if isinstance(said, Exception) and not self._ended:
            # The others on that host need not find out by themselves.
            self._keep(self._look_after([address]))
        return said

    async def cancel(self, address: str, number: int) -> None:
        """Stop it. Returns when it has stopped, or is lost anyway."""
        await self._say(address, host.cancel, self.token, number)

    async def give_back(self, address: str) -> None:
        """Give a seat back that is not used."""
        if self._seats[address]:
            self._seats[address] -= 1
            await self._say(address, host.give_back, self.token)

    async def leave(self) -> None:
        """Give all back, let go of the client, and end what is under way."""
        self._ended = True
        if self._beating is not None:
            self._beating.cancel()
        self._seats.clear()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if self._asked:
                    there = self._asked & (await self._listed()).keys()
                    await asyncio.gather(*(self._say(a, host.leave, self.token) for a in there))
        except Exception as error:  # noqa: BLE001 - they find out, as nothing is said any more
            logger.warning("Not all of Dask's workers were told to stop: %s", _told((None, error)))
        finally:
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
            self.do(self.leave()).exception(3 * _CLOSE_SECONDS)
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
            if self._address is None and dask.config.get("scheduler-address", None) is None:
                raise WorkerStartError(  # Dask would start a cluster in this process
                    "Which Dask cluster? Give the scheduler's address in OPTIONS['address'], or in "
                    "Dask's own configuration, as by DASK_SCHEDULER_ADDRESS."
                )
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
            await self._look_after([address for address in self._seats if self._seats[address]])

    async def _look_after(self, addresses: list[str]) -> None:
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                listed = await self._listed()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing can be said to them
            logger.warning("Dask's scheduler does not answer: %s", _told((None, error)))
            listed = {}
        # To say something to one that is not there takes half a minute.
        present = [address for address in addresses if address in listed]
        heard = dict(zip(present, await asyncio.gather(*map(self._hears, present)), strict=True))
        for address in addresses:
            if not heard.get(address, False):
                self._seats[address] = 0
                self._asked.discard(address)
                self._lost(address)

    async def _hears(self, address: str) -> bool:
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                return await self._say(address, host.beat, self.token) is True
        except TimeoutError:
            return False

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Have ``work`` done; the loop refers to it but weakly."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _told(trouble: Any) -> str:
    """What a host said that should not have, or what came instead."""
    match trouble:
        case (_, Exception() as error) | (Exception() as error):
            return f"{type(error).__name__}: {error}"
    return repr(trouble)
