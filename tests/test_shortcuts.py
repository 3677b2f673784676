"""``run_in_pool`` and ``with_lease``: what views call; ``offload`` is in ``test_offload``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, assert_type

import pytest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from leasepool_django import (
    ExecutorLease,
    LeaseUnavailableError,
    offload,
    pools,
    run_in_pool,
    run_in_pool_sync,
    with_lease,
)
from leasepool_django.shortcuts import OffloadedFunction
from tests.django_jobs import Gate, describe, double, fail, gates, quadruple, triple
from tests.waiting import async_wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

    from tests.conftest import LoopRunner

pytestmark = pytest.mark.urls(__name__)

THREADS = {"BACKEND": "thread", "WORKERS_PER_POOL": 2}
PROCESSES = {"WORKERS_PER_POOL": 2}


@pytest.fixture(autouse=True, params=["thread", "process"])
def backend(request: pytest.FixtureRequest, settings: Settings) -> Iterator[str]:
    alias = THREADS if request.param == "thread" else PROCESSES
    settings.LEASEPOOL = {"default": alias, "reports": alias}
    yield request.param
    pools.reset()


@pytest.fixture
def gate(settings: Settings) -> Iterator[Gate]:
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    gate = gates["test"] = Gate()
    yield gate
    gate.open.set()
    del gates["test"]


# -- one call -------------------------------------------------------------------------------------


def test_one_call_from_async_code(loop_runner: LoopRunner) -> None:
    async def view() -> tuple[int, str]:
        number = await run_in_pool(double, 21)
        text = await run_in_pool(describe, 3, unit="km")
        return number, text

    assert loop_runner(view()) == (42, "3 km")


def test_one_call_from_blocking_code() -> None:
    assert run_in_pool_sync(double, number=4) == 8
    assert run_in_pool_sync(describe, 3, unit="km") == "3 km"


def test_the_functions_error_is_raised(loop_runner: LoopRunner) -> None:
    with pytest.raises(ValueError, match="out of range"):
        loop_runner(run_in_pool(fail, "out of range"))
    with pytest.raises(ValueError, match="out of range"):
        run_in_pool_sync(fail, "out of range")


def test_blocking_a_running_loop_is_refused_with_the_way_out() -> None:
    async def view() -> None:
        with pytest.raises(RuntimeError, match=r"`await run_in_pool\(\.\.\.\)` instead"):
            run_in_pool_sync(double, 1)
        with pytest.raises(RuntimeError, match=r"`await run\(\.\.\.\)` instead"):
            triple.run_sync(1)
        with pytest.raises(RuntimeError, match=r"`await run\(\.\.\.\)` instead"):
            triple.options(timeout=1).run_sync(1)
        # A thread of its own has no loop to block.
        assert await asyncio.to_thread(run_in_pool_sync, double, 2) == 4

    asyncio.run(view())


# -- with_lease -----------------------------------------------------------------------------------


@with_lease(pool="reports", timeout=2.0)
async def report(request: HttpRequest, number: int, *, lease: ExecutorLease) -> JsonResponse:
    """Two numbers."""
    numbers = await asyncio.gather(*(lease.run(double, n) for n in (number, number + 1)))
    return JsonResponse({"numbers": numbers, "owner": lease.owner, "workers": lease.workers})


@with_lease(workers=1, owner="me", lease_seconds=5)
def report_sync(request: HttpRequest, *, lease: ExecutorLease) -> JsonResponse:
    return JsonResponse(
        {"number": lease.run_sync(double, 4), "owner": lease.owner, "for": lease.lease_seconds}
    )


@with_lease(timeout=0.05)
async def impatient(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse("had a lease")


@with_lease(timeout=0.05)
def impatient_sync(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse("had a lease")


@with_lease()
async def careless(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    raise LeaseUnavailableError("from the view itself")


@with_lease()
def careless_sync(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    raise LeaseUnavailableError("from the view itself")


@with_lease
async def bare(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse(f"{lease.owner} {await lease.run(double, 5)}")


@with_lease
def bare_sync(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse(f"{lease.owner} {lease.run_sync(double, 5)}")


def test_an_async_view_gets_a_lease(loop_runner: LoopRunner) -> None:
    response = loop_runner(report(AsyncRequestFactory().get("/"), 3))
    assert response.status_code == 200
    assert response.content == (
        b'{"numbers": [6, 8], "owner": "tests.test_shortcuts.report", "workers": 2}'
    )
    assert pools["reports"].stats().leases == ()


def test_a_plain_view_gets_a_lease() -> None:
    response = report_sync(RequestFactory().get("/"))
    assert response.content == b'{"number": 8, "owner": "me", "for": 5.0}'
    assert pools["default"].stats().leases == ()


def test_a_view_stays_what_it_was() -> None:
    assert inspect.iscoroutinefunction(report)
    assert not inspect.iscoroutinefunction(report_sync)
    assert report.__name__ == "report"
    assert report.__doc__ == "Two numbers."


def test_methods_are_views_too() -> None:
    @method_decorator(with_lease(), name="get")
    class Report(View):
        def get(self, request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
            return HttpResponse(str(lease.run_sync(double, 5)))

    response = Report.as_view()(RequestFactory().get("/"))
    assert isinstance(response, HttpResponse)
    assert response.content == b"10"


def test_a_view_may_be_decorated_without_parentheses(loop_runner: LoopRunner) -> None:
    response = loop_runner(bare(AsyncRequestFactory().get("/")))
    assert response.content == b"tests.test_shortcuts.bare 10"
    response = bare_sync(RequestFactory().get("/"))
    assert response.content == b"tests.test_shortcuts.bare_sync 10"
    assert inspect.iscoroutinefunction(bare)


BAD: dict[str, list[Any]] = {
    "timeout": [0, "2"],
    "workers": [0, 1.5],
    "owner": [5],
    "pool": [None, ""],
}
BAD["lease_seconds"] = [-1, math.nan]


@pytest.mark.parametrize(("name", "value"), [(n, value) for n in BAD for value in BAD[n]])
def test_bad_options_are_refused_where_they_are_written(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        with_lease(**{name: value})
    with_lease(lease_seconds=math.inf)


def test_a_class_is_no_view() -> None:
    class Report(View): ...

    others: list[Any] = [Report, None]
    for other in others:
        with pytest.raises(TypeError, match=r"@method_decorator.*name='dispatch'"):
            with_lease()(other)


@method_decorator(with_lease(), name="dispatch")
class Dispatched(View):
    async def get(self, request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
        assert pools["default"].stats().leases != ()
        return HttpResponse(str(await lease.run(double, 5)))


class Called:
    """A view that is an object."""

    async def __call__(self, request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
        return HttpResponse(str(await lease.run(double, 5)))


def hidden(request: HttpRequest, lease: ExecutorLease) -> Any:
    """Return a coroutine without being known as a coroutine function."""
    return Called()(request, lease)


ASYNC_AT_HEART = [
    Dispatched.as_view(),
    with_lease()(Called()),
    with_lease()(functools.partial(Called())),
    with_lease()(hidden),
]


@pytest.mark.parametrize("view", ASYNC_AT_HEART)
def test_a_view_that_turns_out_to_be_async_holds_its_lease_to_the_end(
    view: Any, loop_runner: LoopRunner
) -> None:
    async def serve() -> HttpResponse:
        response: HttpResponse = await view(AsyncRequestFactory().get("/"))
        return response

    assert loop_runner(serve()).content == b"10"
    assert pools["default"].stats().leases == ()


@pytest.mark.parametrize("view", ASYNC_AT_HEART)
def test_a_view_that_turns_out_to_be_async_waits_without_blocking_the_loop(
    view: Any, gate: Gate, settings: Settings
) -> None:
    settings.LEASEPOOL = {"default": {**THREADS, "ACQUIRE_TIMEOUT": 0.1}}

    async def crowd() -> None:
        async with pools["default"].lease():
            waiting = asyncio.create_task(_awaited(view(AsyncRequestFactory().get("/"))))
            await async_wait_until(lambda: pools["default"].stats().waiting == 1)
            response = await waiting
        assert response.status_code == 503
        assert int(response["Retry-After"]) >= 1

    async def _awaited(answer: Any) -> Any:
        return await answer

    asyncio.run(crowd())


def test_an_object_is_an_async_view_where_its_call_is() -> None:
    assert inspect.iscoroutinefunction(with_lease()(Called()))
    assert inspect.iscoroutinefunction(with_lease()(functools.partial(Called())))


class DispatchedInBody(View):
    @with_lease
    def dispatch(self, request: HttpRequest, lease: ExecutorLease) -> Any:
        return super().dispatch(request, lease=lease)

    async def get(self, request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
        return await Dispatched().get(request, lease=lease)


@pytest.mark.parametrize("url", ["/dispatched", "/dispatched-in-body"])
def test_a_class_based_view_is_async_in_both_kinds_of_server(url: str, settings: Settings) -> None:
    async def fetch() -> Any:
        return await AsyncClient().get(url)

    assert asyncio.run(fetch()).content == b"10"
    assert Client().get(url).content == b"10"
    settings.LEASEPOOL = {"default": {**THREADS, "ACQUIRE_TIMEOUT": 0.1}}
    with pools["default"].lease_sync(), ThreadPoolExecutor(2) as others:
        assert others.submit(asyncio.run, fetch()).result().status_code == 503
        assert others.submit(Client().get, url).result().status_code == 503


def test_without_a_lease_in_time_an_async_view_answers_503(gate: Gate) -> None:
    async def crowd() -> None:
        async with pools["default"].lease():
            request = AsyncRequestFactory().get("/", headers={"Accept": "application/json"})
            # A task of its own: who holds a lease must not wait for another.
            response = await asyncio.create_task(impatient(request))
        assert response.status_code == 503
        assert int(response["Retry-After"]) >= 1
        assert response["Content-Type"] == "application/json"
        assert (await impatient(request)).content == b"had a lease"

    asyncio.run(crowd())


def test_without_a_lease_in_time_a_plain_view_answers_503(gate: Gate) -> None:
    async def crowd() -> None:
        async with pools["default"].lease():
            response = await asyncio.to_thread(impatient_sync, RequestFactory().get("/"))
        assert response.status_code == 503
        assert int(response["Retry-After"]) >= 1
        assert response["Content-Type"].startswith("text/html")

    asyncio.run(crowd())


def test_the_views_own_errors_are_its_own(loop_runner: LoopRunner) -> None:
    with pytest.raises(LeaseUnavailableError, match="from the view itself"):
        loop_runner(careless(AsyncRequestFactory().get("/")))
    with pytest.raises(LeaseUnavailableError, match="from the view itself"):
        careless_sync(RequestFactory().get("/"))
    assert pools["default"].stats().leases == ()


def test_a_view_that_would_wait_for_itself_is_told_so(gate: Gate) -> None:
    async def crowd() -> None:
        async with pools["default"].lease():
            await impatient(AsyncRequestFactory().get("/"))

    with pytest.raises(LeaseUnavailableError, match="it would wait for itself"):
        asyncio.run(crowd())
    with (
        pools["default"].lease_sync(),
        pytest.raises(LeaseUnavailableError, match="it would wait for itself"),
    ):
        impatient_sync(RequestFactory().get("/"))


def test_a_view_that_is_cancelled_while_it_waits_leaves_the_line(gate: Gate) -> None:
    async def crowd() -> None:
        manager = pools["default"]
        async with manager.lease():
            waiting = asyncio.create_task(impatient(AsyncRequestFactory().get("/")))
            await async_wait_until(lambda: manager.stats().waiting == 1)
            waiting.cancel()
            await asyncio.wait({waiting})
            assert waiting.cancelled()
            assert manager.stats().waiting == 0

    asyncio.run(crowd())


urlpatterns = [
    path("dispatched", Dispatched.as_view()),
    path("dispatched-in-body", DispatchedInBody.as_view()),
]


# -- types (held by the type checker) -------------------------------------------------------------

if TYPE_CHECKING:

    async def types(lease: ExecutorLease) -> None:
        assert_type(await run_in_pool(double, 1), int)
        assert_type(await run_in_pool(describe, 1, unit="m"), str)
        assert_type(run_in_pool_sync(double, 1), int)
        plain: OffloadedFunction[[int], int] = offload(double)
        assert_type(plain(1), int)
        assert_type(await report(HttpRequest(), 3), JsonResponse | HttpResponse)
        assert_type(report_sync(HttpRequest()), JsonResponse | HttpResponse)
        assert_type(triple(1), int)
        assert_type(await triple.run(1), int)
        assert_type(await quadruple.run(1, plus=2), int)
        assert_type(quadruple.run_sync(1, plus=2), int)
        assert_type(await quadruple.options(timeout=1).run(1, plus=2), int)
        assert_type(await lease.run(quadruple, 1, plus=2), int)
        assert_type(lease.run_sync(double, 1), int)
        assert_type(await pools["default"].run(double, 1), int)
        assert_type(await pools["default"].options(timeout=1).run(double, 1), int)

        await run_in_pool(double, "1")  # type: ignore[arg-type]
        await run_in_pool(double)  # type: ignore[call-arg]
        await run_in_pool(describe, 1, units="m")  # type: ignore[call-arg]
        run_in_pool_sync(double, "1")  # type: ignore[arg-type]
        triple("1")  # type: ignore[arg-type]
        await triple.run("1")  # type: ignore[arg-type]
        triple.run_sync()  # type: ignore[call-arg]
        await quadruple.run(1, minus=2)  # type: ignore[call-arg]
        await quadruple.options(timeout=1).run("1")  # type: ignore[arg-type]
        await lease.run(double, "1")  # type: ignore[arg-type]
        offload(pool=3)  # type: ignore[call-overload]
