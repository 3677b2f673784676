"""``LeasePoolLifespan``: pools live as long as the server, whatever it wraps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from django.core.asgi import get_asgi_application

from leasepool_django import pools, run_in_pool
from leasepool_django.asgi import LeasePoolLifespan
from tests.asgi_server import SHUTDOWN, STARTED, STARTUP, STOPPED, Message, Server, serving
from tests.django_jobs import double
from tests.waiting import async_wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

    from tests.conftest import LoopRunner

THREADS: dict[str, Any] = {"BACKEND": "thread", "WORKERS_PER_POOL": 1}


@pytest.fixture(autouse=True)
def thread_pools(settings: Settings) -> Iterator[None]:
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    yield
    pools.reset()


async def no_lifespan(scope: Message, receive: Any, send: Any) -> None:
    raise ValueError(f"no {scope['type']} here")


class Inner:
    """An application with a lifespan of its own, which writes down what happens when."""

    def __init__(self, **answers: str) -> None:
        self.log: list[str] = []
        self.scope: Message = {}
        self.answers = answers

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.scope = scope
        for phase in ("startup", "shutdown"):
            message = await receive()
            assert message["type"] == f"lifespan.{phase}"
            running = pools["default"].started
            self.log.append(f"{phase} with pools {'running' if running else 'stopped'}")
            if phase == "startup" and "state" in scope:
                scope["state"]["inner"] = "set"
            if phase in self.answers:
                await send({"type": f"lifespan.{phase}.failed", "message": self.answers[phase]})
                return
            await send({"type": f"lifespan.{phase}.complete"})


def running() -> list[str]:
    return [alias for alias, manager in pools.items() if manager.started]


# -- start and end --------------------------------------------------------------------------------


def test_pools_run_from_startup_to_shutdown(loop_runner: LoopRunner) -> None:
    async def live() -> None:
        async with serving(LeasePoolLifespan(no_lifespan)) as server:
            assert running() == ["default", "reports"]
            assert server.scope["state"]["leasepool"] is pools
            assert await run_in_pool(double, 2) == 4
        assert running() == []

    loop_runner(live())


def test_it_wraps_django_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def live() -> None:
        async with serving(LeasePoolLifespan(get_asgi_application())):
            assert running() == ["default", "reports"]

    with caplog.at_level("INFO", "leasepool_django"):
        asyncio.run(live())
    assert running() == []
    assert caplog.text == ""


def test_a_server_without_state_is_served() -> None:
    async def live() -> None:
        async with serving(LeasePoolLifespan(no_lifespan), {"type": "lifespan"}) as server:
            assert "state" not in server.scope

    asyncio.run(live())


def test_a_server_may_live_twice_in_one_process() -> None:
    async def live() -> None:
        for _ in range(2):
            async with serving(LeasePoolLifespan(no_lifespan)):
                assert running() == ["default", "reports"]

    asyncio.run(live())


def test_a_pool_that_cannot_start_is_reported_with_its_reason(
    settings: Settings, loop_runner: LoopRunner
) -> None:
    initializer = {
        "initializer": "tests.django_jobs.refuse_to_start",
        "initargs": ["the licence has expired"],
    }
    settings.LEASEPOOL = {
        "default": THREADS,
        "reports": {"WORKERS_PER_POOL": 1, "OPTIONS": initializer},
    }

    async def live() -> Message:
        server = Server(LeasePoolLifespan(no_lifespan))
        answer = await server.ask(STARTUP)
        await server.end()
        return answer

    answer = loop_runner(live())
    assert answer["type"] == "lifespan.startup.failed"
    text = answer["message"]
    assert text.startswith("The lease pools did not start: WorkerStartError: ")
    assert "ImproperlyConfigured: the licence has expired" in text
    assert text.count("in refuse_to_start") == 1
    assert running() == []


def test_mistakes_in_the_settings_are_reported(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"MAX_POOL": 3, "MAX_POOLS": 0}}

    async def live() -> Message:
        server = Server(LeasePoolLifespan(no_lifespan))
        answer = await server.ask(STARTUP)
        await server.end()
        return answer

    answer = asyncio.run(live())
    assert answer["type"] == "lifespan.startup.failed"
    assert "Did you mean 'MAX_POOLS'?" in answer["message"]
    assert "Traceback" not in answer["message"]
    settings.LEASEPOOL = None


def test_an_unforeseen_error_comes_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_all() -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(pools, "start_all", start_all)

    async def live() -> Message:
        server = Server(LeasePoolLifespan(no_lifespan))
        answer = await server.ask(STARTUP)
        await server.end()
        return answer

    text = asyncio.run(live())["message"]
    assert "OSError: too many open files" in text
    assert "in start_all" in text


def test_pools_that_do_not_stop_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    async def live() -> Message:
        server = Server(LeasePoolLifespan(no_lifespan))
        await server.ask(STARTUP)

        async def stop_all() -> None:
            raise OSError("a worker is stuck")

        with monkeypatch.context() as patch:
            patch.setattr(pools, "stop_all", stop_all)
            answer = await server.ask(SHUTDOWN)
        await server.end()
        return answer

    answer = asyncio.run(live())
    assert answer["type"] == "lifespan.shutdown.failed"
    assert "a worker is stuck" in answer["message"]
    assert running() == []


def test_a_forced_exit_stops_the_pools(loop_runner: LoopRunner) -> None:
    async def live() -> None:
        inner = Inner()
        server = Server(LeasePoolLifespan(inner))
        assert await server.ask(STARTUP) == STARTED
        # There is no shutdown message; the server cancels the task that waits for it.
        await async_wait_until(lambda: inner.log)
        server.task.cancel()
        with suppress(asyncio.CancelledError):
            await server.task
        assert server.task.cancelled()
        assert running() == []

    loop_runner(live())


def test_a_loop_that_ends_stops_the_pools() -> None:
    async def live() -> None:
        server = Server(LeasePoolLifespan(Inner()))
        assert await server.ask(STARTUP) == STARTED

    asyncio.run(live())
    assert running() == []


# -- an inner lifespan ----------------------------------------------------------------------------


def test_an_inner_lifespan_is_inside_that_of_the_pools(loop_runner: LoopRunner) -> None:
    async def live() -> None:
        inner = Inner()
        async with serving(LeasePoolLifespan(inner)) as server:
            assert inner.scope is server.scope
            assert server.scope["state"] == {"leasepool": pools, "inner": "set"}
        assert inner.log == ["startup with pools running", "shutdown with pools running"]

    loop_runner(live())
    assert running() == []


def test_an_inner_startup_that_fails_is_passed_on_and_stops_the_pools() -> None:
    async def live() -> Message:
        server = Server(LeasePoolLifespan(Inner(startup="no database")))
        answer = await server.ask(STARTUP)
        await server.end()
        return answer

    expected = {"type": "lifespan.startup.failed", "message": "no database"}
    assert asyncio.run(live()) == expected
    assert running() == []


def test_an_inner_shutdown_that_fails_is_passed_on_and_stops_the_pools() -> None:
    async def live() -> Message:
        server = Server(LeasePoolLifespan(Inner(shutdown="not saved")))
        assert await server.ask(STARTUP) == STARTED
        answer = await server.ask(SHUTDOWN)
        await server.end()
        return answer

    expected = {"type": "lifespan.shutdown.failed", "message": "not saved"}
    assert asyncio.run(live()) == expected
    assert running() == []


@pytest.mark.parametrize("error", [ValueError, AssertionError, NotImplementedError])
def test_an_inner_application_that_refuses_is_one_without_lifespan(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(scope: Message, receive: Any, send: Any) -> None:
        raise error("only http")

    async def live() -> None:
        async with serving(LeasePoolLifespan(refuse)):
            assert running() == ["default", "reports"]

    with caplog.at_level("INFO", "leasepool_django"):
        asyncio.run(live())
    [record] = [record for record in caplog.records if record.name == "leasepool_django.asgi"]
    assert record.levelname == "INFO"
    assert record.getMessage().endswith(f"no lifespan: {error.__name__}: only http")


@pytest.mark.parametrize(("error", "listens"), [(KeyError, False), (ValueError, True)])
def test_an_inner_application_that_breaks_is_served_and_the_break_is_logged(
    *, error: type[Exception], listens: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(scope: Message, receive: Any, send: Any) -> None:
        if listens:  # so it has a lifespan, whatever it raises
            await receive()
        raise error("DATABASE_URL")

    async def live() -> None:
        async with serving(LeasePoolLifespan(broken)):
            assert running() == ["default", "reports"]

    asyncio.run(live())
    [record] = [record for record in caplog.records if record.name == "leasepool_django.asgi"]
    assert record.levelname == "WARNING"
    assert record.exc_info is not None


def test_an_inner_application_that_returns_is_one_without_lifespan() -> None:
    async def silent(scope: Message, receive: Any, send: Any) -> None:
        return

    async def live() -> None:
        async with serving(LeasePoolLifespan(silent)):
            assert running() == ["default", "reports"]

    asyncio.run(live())


def test_an_inner_application_that_answers_and_returns_has_answered() -> None:
    async def brief(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "brief"})

    async def live() -> Message:
        server = Server(LeasePoolLifespan(brief))
        answer = await server.ask(STARTUP)
        await server.end()
        return answer

    assert asyncio.run(live())["message"] == "brief"


def test_an_inner_application_that_breaks_while_serving_does_not_stop_the_server() -> None:
    async def fragile(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        await send(STARTED)
        raise RuntimeError("lost its connection")

    async def live() -> None:
        async with serving(LeasePoolLifespan(fragile)):
            await asyncio.sleep(0)
            assert running() == ["default", "reports"]

    asyncio.run(live())
    assert running() == []


def test_an_inner_application_that_never_returns_is_cancelled() -> None:
    ended: list[str] = []

    async def lingering(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        await send(STARTED)
        await receive()
        await send(STOPPED)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def live() -> None:
        async with serving(LeasePoolLifespan(lingering)):
            pass

    asyncio.run(live())
    assert ended == ["cancelled"]


def test_nested_wrappers_start_the_pools_once() -> None:
    inner = Inner()

    async def live() -> None:
        async with serving(LeasePoolLifespan(LeasePoolLifespan(inner))):
            assert pools["default"].stats().workers_started == 1
        assert inner.log == ["startup with pools running", "shutdown with pools running"]

    asyncio.run(live())


# -- everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_every_other_scope_passes_through_untouched(kind: str) -> None:
    seen: list[object] = []

    async def application(*arguments: Any) -> None:
        seen.extend(arguments)

    async def receive() -> Message:
        raise AssertionError("nobody may read for the application")

    async def send(message: Message) -> None:
        raise AssertionError("nobody may write for the application")

    scope = {"type": kind}
    asyncio.run(LeasePoolLifespan(application)(scope, receive, send))
    assert seen[0] is scope
    assert seen[1:] == [receive, send]
    assert scope == {"type": kind}
    assert running() == []
