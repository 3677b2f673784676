"""README: a view that is given its lease."""

from __future__ import annotations

import asyncio

from django.http import HttpRequest, JsonResponse

from example_project.cpu import count_primes
from leasepool_django import ExecutorLease, with_lease


@with_lease(pool="reports", timeout=2.0)
async def report(request: HttpRequest, lease: ExecutorLease) -> JsonResponse:
    limits = [20_000, 21_000, 22_000, 23_000]
    counts = await asyncio.gather(*(lease.run(count_primes, limit) for limit in limits))
    return JsonResponse({"primes": counts})
