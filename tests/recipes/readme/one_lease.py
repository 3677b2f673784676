"""README: several calls under one lease."""

from __future__ import annotations

import asyncio

from django.http import HttpRequest, JsonResponse

from example_project.cpu import count_primes
from leasepool_django import pools


async def primes(request: HttpRequest) -> JsonResponse:
    limits = [20_000, 21_000, 22_000, 23_000]
    async with pools["default"].lease(owner="primes", workers=1) as lease:
        counts = await asyncio.gather(*(lease.run(count_primes, limit) for limit in limits))
    return JsonResponse({"primes": counts})
