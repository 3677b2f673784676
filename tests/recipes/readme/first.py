"""README: the first view."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse

from example_project.cpu import count_primes
from leasepool_django import run_in_pool


async def primes(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"primes": await run_in_pool(count_primes, 500_000)})
