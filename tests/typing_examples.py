"""What type checkers make of the public functions: checked by mypy in ``make check``, never run.

An ``ignore`` marks a mistake that must be found: mypy reports one that is not needed.
"""

from __future__ import annotations

import asyncio
from typing import assert_type

from django.http import HttpRequest, HttpResponse, JsonResponse

from leasepool_django import (
    ExecutorLease,
    LeasedExecutorManager,
    offload,
    pools,
    run_in_pool,
    run_in_pool_sync,
    with_lease,
)


def count(limit: int, *, start: int = 2) -> int:
    """Count something."""
    return limit - start


@offload
def score(order: dict[str, float]) -> float:
    """Score something."""
    return sum(order.values())


@offload(pool="reports", timeout=2.0)
def render(title: str) -> bytes:
    """Render something."""
    return title.encode()


async def one_shot_calls() -> None:
    """Arguments are checked, results inferred."""
    assert_type(await run_in_pool(count, 3), int)
    assert_type(await run_in_pool(count, 3, start=1), int)
    assert_type(run_in_pool_sync(count, 3), int)
    await run_in_pool(count, "3")  # type: ignore[arg-type]
    await run_in_pool(count)  # type: ignore[call-arg]
    await run_in_pool(count, 3, stop=1)  # type: ignore[call-arg]
    run_in_pool_sync(count, None)  # type: ignore[arg-type]


async def by_alias() -> None:
    """Options never mix with the function's own keywords."""
    options = pools["reports"].options(call_timeout=5, timeout=1, owner="invoice 7")
    assert_type(await options.run(count, 3), int)
    assert_type(options.run_sync(count, 3), int)
    await options.run(count, "3")  # type: ignore[arg-type]
    assert_type(await pools["reports"].run(score, {"a": 1.0}), float)


class Scale:
    """Has methods that are offloaded."""

    @offload
    def apply(self, number: int, *, plus: int = 0) -> float:
        """Scale a number."""
        return float(number + plus)

    @staticmethod
    @offload
    def twice(number: int) -> int:
        """Double a number."""
        return 2 * number


async def offloaded_methods(scale: Scale) -> None:
    """A method's instance is bound, on the way to a worker too."""
    assert_type(scale.apply(3), float)
    assert_type(await scale.apply.run(3, plus=1), float)
    assert_type(scale.apply.options(timeout=1).run_sync(3), float)
    assert_type(Scale.apply(scale, 3), float)
    assert_type(Scale.twice.run_sync(3), int)
    scale.apply("3")  # type: ignore[arg-type]
    await scale.apply.run()  # type: ignore[call-arg]
    Scale.apply(3)  # type: ignore[call-arg, arg-type]


async def offloaded() -> None:
    """A plain call, and both ways to a worker."""
    assert_type(score({"a": 1.0}), float)
    assert_type(await score.run({"a": 1.0}), float)
    assert_type(render.run_sync("x"), bytes)
    assert_type(await render.options(call_timeout=1).run("x"), bytes)
    await render.run(3)  # type: ignore[arg-type]
    score(3)  # type: ignore[arg-type]
    await render.options(owner=3).run("x")  # type: ignore[arg-type]


async def leases(manager: LeasedExecutorManager) -> None:
    """All spellings of a lease."""
    async with manager.lease(owner="x", workers=2) as lease:
        assert_type(lease, ExecutorLease)
        assert_type(await lease.run(count, 3), int)
        assert_type(
            await asyncio.gather(lease.run(count, 1), lease.run(score, {})), tuple[int, float]
        )
        assert_type(lease.executor.submit(count, 3).result(), int)
        await lease.run(count, "3")  # type: ignore[arg-type]
    async with await manager.acquire(owner="x") as lease:
        assert_type(lease, ExecutorLease)
    with manager.lease_sync(timeout=1.0) as lease:
        assert_type(lease.run_sync(count, 3), int)
        assert_type(lease.options(call_timeout=2).run_sync(count, 3), int)
    with manager.acquire_sync() as lease:
        lease.run_sync(count)  # type: ignore[call-arg]


@with_lease(pool="reports", timeout=2.0)
async def view(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    """Stay a view."""
    return JsonResponse({"n": await lease.run(count, 3)})


@with_lease()
def sync_view(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    """Stay a view."""
    return JsonResponse({"n": lease.run_sync(count, 3)})


@with_lease
async def bare_view(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    """Stay a view, without parentheses too."""
    return JsonResponse({"n": await lease.run(count, 3)})


@with_lease
def bare_sync_view(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    """Stay a view."""
    return JsonResponse({"n": lease.run_sync(count, 3)})


async def views() -> None:
    """Async views stay async."""
    assert_type(await view(HttpRequest()), HttpResponse)
    assert_type(await bare_view(HttpRequest()), HttpResponse)
    assert_type(bare_sync_view(HttpRequest()), HttpResponse)
    with_lease(pool=None)  # type: ignore[call-overload]
    with_lease(timeout="2")  # type: ignore[call-overload]
