"""The project's views: each way to use the pool, from async and from sync code."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from django.http import HttpRequest, JsonResponse

from leasepool_django import (
    ExecutorLease,
    LeasePoolError,
    pools,
    run_in_pool,
    run_in_pool_sync,
    with_lease,
)

from . import jobs


def alive(request: HttpRequest) -> JsonResponse:
    """Answer with which server, and which process of it, this is. Uses no pool."""
    state = getattr(request, "scope", {}).get("state", {})
    return JsonResponse(
        {"mark": os.environ["SERVERS_MARK"], "pid": os.getpid(), "state": "leasepool" in state}
    )


async def line(request: HttpRequest) -> JsonResponse:
    """Tell how many callers wait in line, and how many workers are busy."""
    stats = pools["default"].stats()
    return JsonResponse({"waiting": stats.waiting, "busy": stats.busy_workers})


async def once_async(request: HttpRequest) -> JsonResponse:
    """One call."""
    return JsonResponse({"results": [await run_in_pool(jobs.double, 21)]})


def once_sync(request: HttpRequest) -> JsonResponse:
    """One call."""
    return JsonResponse({"results": [run_in_pool_sync(jobs.double, 21)]})


@with_lease(timeout=10.0)
async def lease_async(request: HttpRequest, lease: ExecutorLease) -> JsonResponse:
    """Three calls on a lease of two workers."""
    results = await asyncio.gather(*(lease.run(jobs.double, number) for number in (1, 2, 3)))
    return JsonResponse({"results": results})


@with_lease(timeout=10.0)
def lease_sync(request: HttpRequest, lease: ExecutorLease) -> JsonResponse:
    """Three calls on a lease of two workers."""
    results = [lease.run_sync(jobs.double, 1), *lease.executor.map(jobs.double, (2, 3))]
    return JsonResponse({"results": results})


async def spin(request: HttpRequest) -> JsonResponse:
    """A call that never ends by itself."""
    await run_in_pool(jobs.spin, request.GET["mark"])
    return JsonResponse({})


async def slow_async(request: HttpRequest) -> JsonResponse:
    """A call on each worker, and one that waits for a worker meanwhile."""
    seconds, mark = float(request.GET["seconds"]), request.GET["mark"]
    async with pools["default"].lease() as lease:
        running = asyncio.gather(
            lease.run(jobs.sleep, seconds, mark), lease.run(jobs.sleep, seconds, f"{mark}.2")
        )
        waiter = asyncio.ensure_future(_outcome())
        workers = await running
    ended = time.monotonic()
    return JsonResponse({"workers": workers, "ended": ended, "waiter": await waiter})


async def _outcome() -> dict[str, Any]:
    """What a caller in line got, and when (monotonic, the same for all processes)."""
    try:
        await run_in_pool(jobs.double, 1)
    except LeasePoolError as error:
        return {"error": f"{type(error).__name__}: {error}", "at": time.monotonic()}
    return {"error": None, "at": time.monotonic()}


def slow_sync(request: HttpRequest) -> JsonResponse:
    """One call that takes a while."""
    seconds, mark = float(request.GET["seconds"]), request.GET["mark"]
    return JsonResponse({"workers": [run_in_pool_sync(jobs.sleep, seconds, mark)]})
