"""README: sync views."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse

from example_project.cpu import count_primes
from leasepool_django import pools, run_in_pool_sync


def primes(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"primes": run_in_pool_sync(count_primes, 20_000)})


def two_at_once(request: HttpRequest) -> JsonResponse:
    with pools["reports"].lease_sync(owner="two at once") as lease:
        counts = list(lease.executor.map(count_primes, [20_000, 21_000]))
    return JsonResponse({"primes": counts})
