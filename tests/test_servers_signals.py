"""What is done when a server is told to stop, before its lifespan ends; in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path

from leasepool_django import (
    ExecutorLease,
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    LeaseReleasedError,
    pools,
    run_in_pool,
    with_lease,
)
from leasepool_django.asgi import LeasePoolLifespan
from leasepool_django.middleware import LeasePoolMiddleware
from tests.django_jobs import Gate, double, gates, through_gate
from tests.waiting import async_wait_until, wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

pytestmark = pytest.mark.urls(__name__)

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
MIDDLEWARE = ["leasepool_django.middleware.LeasePoolMiddleware"]


@with_lease()
async def leased(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse("leased")


@with_lease()
def leased_sync(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    return HttpResponse("leased")


async def once(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await run_in_pool(double, 2))


urlpatterns = [
    path("leased", leased),
    path("leased-sync", leased_sync),
    path("once", once),
]


@pytest.fixture(autouse=True)
def thread_pool(settings: Settings) -> Iterator[None]:
    settings.MIDDLEWARE = MIDDLEWARE
    settings.LEASEPOOL = {"default": {"BACKEND": "thread", "WORKERS_PER_POOL": 1}}
    yield
    pools.reset()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gates["signals"] = gate = Gate()
    yield gate
    gate.open.set()
    del gates["signals"]


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """The server's own handling of a signal."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


async def live(told: Callable[[], Any]) -> None:
    """Be a server: from start-up, by way of ``await told()``, to the end."""
    to_app: asyncio.Queue[Any] = asyncio.Queue()
    answers: asyncio.Queue[Any] = asyncio.Queue()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no lifespan here")

    server = asyncio.create_task(
        LeasePoolLifespan(inner)({"type": "lifespan"}, to_app.get, answers.put)
    )
    to_app.put_nowait({"type": "lifespan.startup"})
    assert (await answers.get())["type"] == "lifespan.startup.complete"
    # The answer is given a moment before the signals are noticed.
    await asyncio.sleep(0)
    try:
        await told()
    finally:
        to_app.put_nowait({"type": "lifespan.shutdown"})
        assert (await answers.get())["type"] == "lifespan.shutdown.complete"
        await server


@pytest.mark.parametrize("number", SIGNALS)
def test_who_waits_is_refused_and_what_runs_goes_on(number: signal.Signals, gate: Gate) -> None:
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    async def told() -> None:
        running = asyncio.create_task(run_in_pool(through_gate, "signals"))
        await async_wait_until(lambda: pools["default"].stats().busy_workers == 1)
        waiting = asyncio.create_task(run_in_pool(double, 2))
        await async_wait_until(lambda: pools["default"].stats().waiting == 1)
        signal.raise_signal(number)
        with pytest.raises(LeasePoolNotStartedError):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(LeasePoolNotStartedError):
            await run_in_pool(double, 2)
        gate.open.set()
        assert await running == "passed"

    with handled(number, stop):
        asyncio.run(live(told))
        assert received == [number]
        assert signal.getsignal(number) is stop


def test_a_signal_reaches_the_servers_handler_when_the_loop_is_closed() -> None:
    program = """
import asyncio, os, signal
import django

django.setup()
from leasepool_django.asgi import LeasePoolLifespan
from tests.asgi_server import STARTED, STARTUP, Server

def stop(number, frame):
    print("told", number, flush=True)
    os._exit(0)  # with a loop that was closed too early, there is no orderly end

async def inner(scope, receive, send):
    raise ValueError("no lifespan here")

async def start():
    server = Server(LeasePoolLifespan(inner))
    assert await server.ask(STARTUP) == STARTED
    await asyncio.sleep(0)
    return server

signal.signal(signal.SIGTERM, stop)
loop = asyncio.new_event_loop()
server = loop.run_until_complete(start())
assert signal.getsignal(signal.SIGTERM) is not stop
loop.close()
signal.raise_signal(signal.SIGTERM)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.stdout == f"told {signal.SIGTERM.value}\n", ran.stderr


def test_who_holds_a_lease_keeps_it_until_the_server_is_done() -> None:
    async def told() -> None:
        async with pools["default"].lease() as lease:
            assert await lease.run(double, 1) == 2
            signal.raise_signal(signal.SIGTERM)
            await async_wait_until(lambda: not pools["default"].started)
            for number in range(3):
                assert await lease.run(double, number) == 2 * number
            await pools.stop_all()
            with pytest.raises(LeaseReleasedError):
                await lease.run(double, 1)

    with handled(signal.SIGTERM, lambda *_: None):
        asyncio.run(live(told))


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_that_no_python_code_handles_stays_alone(handler: signal.Handlers) -> None:
    async def told() -> None:
        assert signal.getsignal(signal.SIGTERM) is handler

    with handled(signal.SIGTERM, handler):
        asyncio.run(live(told))
        assert signal.getsignal(signal.SIGTERM) is handler


def test_handlers_set_meanwhile_stay() -> None:
    def later(signum: int, frame: FrameType | None) -> None:
        raise AssertionError

    async def told() -> None:
        signal.signal(signal.SIGTERM, later)

    with handled(signal.SIGTERM, lambda *_: None):
        asyncio.run(live(told))
        assert signal.getsignal(signal.SIGTERM) is later


def test_outside_the_main_thread_no_signal_is_touched() -> None:
    errors: list[BaseException] = []

    async def told() -> None:
        assert signal.getsignal(signal.SIGTERM) is handler

    def serve() -> None:
        try:
            asyncio.run(live(told))
        except BaseException as error:  # noqa: BLE001 - for the test's thread
            errors.append(error)

    def handler(signum: int, frame: FrameType | None) -> None:
        raise AssertionError

    with handled(signal.SIGTERM, handler):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join(20)
    assert errors == []


def test_a_server_may_cancel_the_lifespan_once_it_has_the_last_answer() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})
        await asyncio.sleep(60)  # it takes its time

    async def live() -> None:
        to_app: asyncio.Queue[Any] = asyncio.Queue()
        answers: asyncio.Queue[Any] = asyncio.Queue()
        server = asyncio.create_task(
            LeasePoolLifespan(inner)({"type": "lifespan"}, to_app.get, answers.put)
        )
        for phase in ("startup", "shutdown"):
            to_app.put_nowait({"type": f"lifespan.{phase}"})
            assert (await answers.get())["type"] == f"lifespan.{phase}.complete"
        server.cancel()
        await server

    asyncio.run(live())


@pytest.mark.parametrize("address", ["/leased", "/leased-sync", "/once"])
def test_requests_of_the_last_moment_get_a_503(address: str, settings: Settings) -> None:
    assert Client().get(address).status_code == 200
    pools.request_stop()
    wait_until(lambda: not pools["default"].started)
    for response in (Client().get(address), asyncio.run(AsyncClient().get(address))):
        assert response.status_code == 503
        assert response["Retry-After"] == "1"
        assert "The server is being restarted." in response.content.decode()
        assert "default" not in response.content.decode()


def test_a_manager_that_nobody_started_is_no_reason_to_ask_again() -> None:
    assert not pools.closed
    manager = LeasedExecutorManager(backend="thread", max_pools=1)
    with pytest.raises(LeasePoolNotStartedError, match="has not been started") as caught:
        manager.run_sync(double, 2)
    middleware = LeasePoolMiddleware(lambda _: HttpResponse())
    assert middleware.process_exception(HttpRequest(), caught.value) is None
