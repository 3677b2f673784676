"""Who is measured: one small adapter for each way to run a function on another core.

Behind one interface: ``await start()``, ``await run(fn, *args)``, ``await stop()``. Each is set up
as its documentation shows it, with nothing but the number of workers and, where a measurement asks
for it, a start method and an initializer that sets Django up. Libraries are imported when an
adapter is made, so that ``start()`` costs what it costs in a server that runs already.

Long because it is a list: one adapter after the other, each of a few lines.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, ClassVar

from . import jobs
from .measuring import NotMeasuredError

__all__ = ["CONTENDERS", "OURS", "OUT_OF_SCOPE", "Contender", "Entry", "Wanted", "make"]


@dataclass(frozen=True)
class Wanted:
    """What a measurement needs of a contender.

    ``django``: the workers have Django set up before their first call. ``ballast``: they have the
    400 MB of ``ballast`` loaded. ``growing``: it begins with one worker and adds others, up to
    ``workers``, when all are busy. ``translated``: calls come from where a language and a time
    zone other than the defaults are active. ``defaults``: no setting at all, where there are any.
    """

    workers: int = 2
    django: bool = False
    ballast: bool = False
    growing: bool = False
    translated: bool = False
    defaults: bool = False


class Contender(ABC):
    """One way to run a function on another core. ``start`` sets ``run``."""

    distribution: ClassVar[str | None] = None
    """The name on PyPI; ``None`` for the standard library."""
    stops_calls: ClassVar[bool] = False
    """Whether cancelling the task that awaits a call ends the running function."""
    grows: ClassVar[bool] = False
    """Whether workers can be started one by one, when all are busy."""
    most_waiting: ClassVar[int | None] = None
    """How many calls may wait for a worker; ``None``: any number."""

    run: Callable[..., Awaitable[Any]]

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        self.wanted = wanted
        self.method = method

    @abstractmethod
    async def start(self) -> None:
        """Begin; calls may be made afterwards."""

    @abstractmethod
    async def stop(self) -> None:
        """End all workers."""

    @property
    def initializer(self) -> Callable[[], None] | None:
        """What every worker is to run first."""
        return jobs.set_up_django if self.wanted.django else None

    @property
    def context(self) -> BaseContext | None:
        """The ``multiprocessing`` context of the start method; ``None``: the library's choice."""
        if self.method is None:
            return None
        if self.method == "preload":
            preload = ["benchmarks.preloaded"] if self.wanted.django else []
            if self.wanted.ballast:
                preload.append("benchmarks.ballast")
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(preload)
            return context
        return multiprocessing.get_context(self.method)


# -- this package ------------------------------------------------------------------------------


class OneShot(Contender):
    """``await manager.run(fn, ...)``: a worker is leased for one call."""

    distribution = "leasepool-django"
    stops_calls = True
    grows = True

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        from leasepool_django import LeasedExecutorManager

        pools, workers = (wanted.workers, 1) if wanted.growing else (1, wanted.workers)
        self.manager = LeasedExecutorManager(max_pools=pools, workers_per_pool=workers)

    async def start(self) -> None:
        await self.manager.start()
        self.run = self.manager.run

    async def stop(self) -> None:
        await self.manager.stop(grace=0)


class InLease(OneShot):
    """``await lease.run(fn, ...)`` within one lease that is held all the time."""

    grows = False

    async def start(self) -> None:
        await super().start()
        self._lease = await self.manager.acquire()
        self.run = self._lease.run

    async def stop(self) -> None:
        await self._lease.release()
        await super().stop()


class InDjango(Contender):
    """``await run_in_pool(fn, ...)``, in a process in which Django is set up."""

    distribution = "leasepool-django"
    stops_calls = True
    grows = True
    nice: ClassVar[int | None] = None
    """The option ``nice`` of the workers; ``None``: its default."""

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.site.settings"
        if not wanted.defaults:
            pools, workers = (wanted.workers, 1) if wanted.growing else (1, wanted.workers)
            os.environ["BENCH_POOLS"], os.environ["BENCH_WORKERS"] = str(pools), str(workers)
            os.environ["BENCH_PRELOAD"] = "benchmarks.ballast" if wanted.ballast else ""
        if self.nice is not None:
            os.environ["BENCH_NICE"] = str(self.nice)
        jobs.set_up_django()
        from leasepool_django import pools as started
        from leasepool_django import run_in_pool

        self._pools = started
        self.run = run_in_pool

    async def start(self) -> None:
        if self.wanted.translated:
            from django.utils import timezone, translation

            translation.activate("de")
            timezone.activate("Europe/Berlin")
        await self._pools.start_all()

    async def stop(self) -> None:
        await self._pools.stop_all(grace=0)


class InDjangoAsEquals(InDjango):
    """As ``InDjango``, with workers that are no nicer than the server: what that changes."""

    nice = 0


# -- concurrent.futures and what looks like it -------------------------------------------------


class Stdlib(Contender):
    """``await loop.run_in_executor(ProcessPoolExecutor(...), fn, ...)``."""

    grows = True
    executor: Executor

    def make_executor(self) -> Executor:
        """The executor, as its users make it."""
        return ProcessPoolExecutor(
            self.wanted.workers, mp_context=self.context, initializer=self.initializer
        )

    async def start(self) -> None:
        self.executor = self.make_executor()
        loop = asyncio.get_running_loop()
        self.run = functools.partial(loop.run_in_executor, self.executor)

    async def stop(self) -> None:
        await asyncio.to_thread(self.executor.shutdown)


class Loky(Stdlib):
    """loky's reusable executor."""

    distribution = "loky"
    grows = False

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import loky

        self._library = loky

    def make_executor(self) -> Executor:
        executor: Executor = self._library.get_reusable_executor(
            max_workers=self.wanted.workers, context=self.method, initializer=self.initializer
        )
        return executor


class Deadpool(Stdlib):
    """deadpool. Cancelling kills the worker by a method of its futures."""

    distribution = "deadpool-executor"
    grows = False
    stops_calls = True
    # Its default `max_backlog`; `submit` blocks beyond, and with it the event loop.
    most_waiting = 1_000

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import deadpool

        self._library = deadpool

    def make_executor(self) -> Executor:
        executor: Executor = self._library.Deadpool(
            max_workers=self.wanted.workers, initializer=self.initializer
        )
        return executor

    async def start(self) -> None:
        await super().start()
        self.run = self._run

    async def _run(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        future: Any = self.executor.submit(fn, *args)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.cancel_and_kill_if_running()
            raise


# -- others ------------------------------------------------------------------------------------


class Pebble(Contender):
    """pebble's ``ProcessPool`` in ``run_in_executor``, whose first argument is a time-out."""

    distribution = "Pebble"
    stops_calls = True

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import pebble

        self._library = pebble

    async def start(self) -> None:
        self._pool = self._library.ProcessPool(
            max_workers=self.wanted.workers,
            initializer=self.initializer,
            context=self.context or multiprocessing,
        )
        self._loop = asyncio.get_running_loop()
        self.run = self._run

    def _run(self, fn: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        return self._loop.run_in_executor(self._pool, fn, None, *args)

    async def stop(self) -> None:
        self._pool.stop()
        await asyncio.to_thread(self._pool.join)


class Anyio(Contender):
    """``anyio.to_process.run_sync``. It has no initializer: functions set Django up themselves."""

    distribution = "anyio"
    stops_calls = True
    grows = True

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        from anyio import CapacityLimiter, to_process

        self._limiter = CapacityLimiter
        self._run_sync: Callable[..., Awaitable[Any]] = to_process.run_sync

    async def start(self) -> None:
        self.run = functools.partial(
            self._run_sync, cancellable=True, limiter=self._limiter(self.wanted.workers)
        )

    async def stop(self) -> None:
        """Nothing: anyio ends its processes when the loop ends."""


class Aiomultiprocess(Contender):
    """aiomultiprocess. It takes coroutine functions, so each call is wrapped in one."""

    distribution = "aiomultiprocess"

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import aiomultiprocess

        self._library = aiomultiprocess

    async def start(self) -> None:
        self._pool = self._library.Pool(processes=self.wanted.workers, initializer=self.initializer)
        self.run = self._run

    def _run(self, fn: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        result: Awaitable[Any] = self._pool.apply(jobs.as_coroutine, (fn, *args))
        return result

    async def stop(self) -> None:
        self._pool.terminate()
        await self._pool.join()


class Leasepool(Contender):
    """leasepool, acquire and run for every call. ``method`` None: its own default.

    As many pools of one worker as there are workers: with one pool, calls run one at a time.
    """

    distribution = "leasepool"
    grows = True
    one_pool: ClassVar[bool] = False

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import leasepool

        options: dict[str, Any] = {}
        if wanted.django:
            options["initializer"] = self.initializer
        if method is not None:
            options["mp_context"] = self.context
        pools, workers = (1, wanted.workers) if self.one_pool else (wanted.workers, 1)
        self.manager = leasepool.LeasedExecutorManager(
            backend="process",
            max_pools=pools,
            # Its executors are made at once, their processes with the first call.
            min_pools=pools,
            workers_per_pool=workers,
            **options,
        )

    async def start(self) -> None:
        await self.manager.start()
        self.run = self._run

    async def _run(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        async with await self.manager.acquire(owner="benchmark") as lease:
            return await lease.run(fn, *args)

    async def stop(self) -> None:
        await self.manager.stop()


class LeasepoolOnePool(Leasepool):
    """leasepool, acquire and run for every call, with all workers in one pool."""

    grows = False
    one_pool = True


class LeasepoolInLease(LeasepoolOnePool):
    """leasepool's ``lease.run`` within one lease that is held all the time."""

    async def start(self) -> None:
        await self.manager.start()
        self._lease = await self.manager.acquire(owner="benchmark")
        self.run = self._lease.run

    async def stop(self) -> None:
        await self._lease.release()
        await super().stop()


class Dask(Contender):
    """Dask's ``LocalCluster``, one thread per worker, without its dashboard.

    Large arguments are scattered first, as its documentation asks: with the call they would go
    through the scheduler.
    """

    distribution = "distributed"
    large: ClassVar[int] = 1_000_000
    """Bytes from which an argument is scattered."""

    def __init__(self, wanted: Wanted, method: str | None) -> None:
        super().__init__(wanted, method)
        import distributed
        from distributed.sizeof import safe_sizeof

        self._library = distributed
        self._sizeof: Callable[[object], int] = safe_sizeof

    async def start(self) -> None:
        self._cluster = await self._library.LocalCluster(
            n_workers=self.wanted.workers,
            threads_per_worker=1,
            asynchronous=True,
            dashboard_address=None,
        )
        self._client = await self._library.Client(self._cluster, asynchronous=True)
        self.run = self._run

    def _run(self, fn: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        if any(self._sizeof(arg) >= self.large for arg in args):
            return self._scattered(fn, *args)
        return self._submitted(fn, *args)

    def _submitted(self, fn: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        # Without pure=False it would answer a repeated call from its store.
        result: Awaitable[Any] = self._client.submit(fn, *args, pure=False)
        return result

    async def _scattered(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        # As above: hash=False is to scatter what pure=False is to submit.
        sent = [
            await self._client.scatter(arg, hash=False) if self._sizeof(arg) >= self.large else arg
            for arg in args
        ]
        return await self._submitted(fn, *sent)

    async def stop(self) -> None:
        await self._client.close()
        await self._cluster.close()


# -- the list ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A contender in the list: its class, title and start method (``None``: its default)."""

    kind: type[Contender]
    title: str
    method: str | None = None


CONTENDERS = {
    "lease": Entry(InLease, "leasepool_django `lease.run`"),
    "run": Entry(OneShot, "leasepool_django `run`"),
    "django": Entry(InDjango, "leasepool_django `run_in_pool`"),
    "django-nice-0": Entry(InDjangoAsEquals, "leasepool_django `run_in_pool`, `nice` 0"),
    "stdlib": Entry(Stdlib, "ProcessPoolExecutor"),
    "loky": Entry(Loky, "loky"),
    "pebble": Entry(Pebble, "pebble"),
    "anyio": Entry(Anyio, "anyio.to_process"),
    "aiomultiprocess": Entry(Aiomultiprocess, "aiomultiprocess"),
    "deadpool": Entry(Deadpool, "deadpool"),
    "dask": Entry(Dask, "Dask LocalCluster"),
    "leasepool": Entry(Leasepool, "leasepool, 1 worker a pool"),
    "leasepool-one": Entry(LeasepoolOnePool, "leasepool, 1 pool"),
    "leasepool-lease": Entry(LeasepoolInLease, "leasepool `lease.run`"),
    "stdlib-spawn": Entry(Stdlib, "ProcessPoolExecutor, spawn", "spawn"),
    "stdlib-forkserver": Entry(Stdlib, "ProcessPoolExecutor, forkserver", "forkserver"),
    "stdlib-preload": Entry(Stdlib, "ProcessPoolExecutor, forkserver, preload", "preload"),
    "pebble-spawn": Entry(Pebble, "pebble, spawn", "spawn"),
    "pebble-forkserver": Entry(Pebble, "pebble, forkserver", "forkserver"),
    "leasepool-forkserver": Entry(Leasepool, "leasepool, forkserver", "forkserver"),
}

OURS = frozenset({"lease", "run", "django", "django-nice-0"})

OUT_OF_SCOPE = {
    "Celery": "it hands work to a broker and to workers that run as a service of their own, and "
    "its results are polled for or fetched from a result store. It answers another need (work that "
    "outlives the request, on other machines), it cannot run without a broker beside it, and its "
    "figures would be the broker's."
}


def make(name: str, wanted: Wanted) -> Contender:
    """The contender ``name``; ``NotMeasuredError`` if its library is not installed."""
    entry = CONTENDERS[name]
    if wanted.django:
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.site.settings"
    try:
        return entry.kind(wanted, entry.method)
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"{error.name} is not installed") from error
