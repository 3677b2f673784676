"""What error reports show of a call, and what functions may do with processes of their own."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from django.test import RequestFactory
from django.views.debug import ExceptionReporter

from leasepool_django import NotPicklableError, offload, pools, run_in_pool, run_in_pool_sync

from . import privacy_jobs as jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

SECRET = "the very secret text"
offloaded = offload(jobs.fails_with)


@pytest.fixture
def running(settings: Settings) -> Iterator[None]:
    """Run one process pool of one worker."""
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1, "SHUTDOWN_GRACE_SECONDS": 0}}
    yield
    pools.reset()


async def by_lease() -> None:
    """Fail under a lease."""
    async with pools["default"].lease() as lease:
        await lease.run(jobs.fails_with, SECRET)


async def by_options() -> None:
    """Fail with options."""
    await pools["default"].options(owner="x").run(jobs.fails_with, secret=SECRET)


def by_lease_sync() -> None:
    """Fail under a lease of blocking code."""
    with pools["default"].lease_sync() as lease:
        lease.run_sync(jobs.fails_with, SECRET)


CALLS: dict[str, Callable[[], Any]] = {
    "run_in_pool": lambda: asyncio.run(run_in_pool(jobs.fails_with, "the very " + "secret text")),
    "run_in_pool_sync": lambda: run_in_pool_sync(jobs.fails_with, "the very " + "secret text"),
    "lease": lambda: asyncio.run(by_lease()),
    "lease_sync": by_lease_sync,
    "options": lambda: asyncio.run(by_options()),
    "options_sync": lambda: pools["default"].options().run_sync(jobs.fails_with, secret=SECRET),
    "offload": lambda: asyncio.run(offloaded.run("the very " + "secret text")),
    "offload_sync": lambda: offloaded.run_sync("the very " + "secret text"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_arguments_are_in_no_frame_of_this_package(running: None, call: Callable[[], Any]) -> None:
    """Error reports show the variables of every frame, in production too."""
    with pytest.raises(ValueError, match="20") as caught:
        call()
    for frame, _ in traceback.walk_tb(caught.tb):
        if "leasepool_django" in frame.f_code.co_filename:
            assert "secret text" not in repr(frame.f_locals), frame
    reporter = ExceptionReporter(None, caught.type, caught.value, caught.tb)
    frames = reporter.get_traceback_frames()
    assert any(frame["function"] == "fails_with" for frame in frames)
    shown = [frame for frame in frames if "leasepool_django" in frame["filename"]]
    assert shown
    assert "secret text" not in repr([frame["vars"] for frame in shown])


def test_a_refusal_does_not_show_the_arguments_either(running: None) -> None:
    """Nor what looked for the culprit."""
    with pytest.raises(NotPicklableError) as caught:
        asyncio.run(run_in_pool(jobs.take, [SECRET, lambda: None]))
    frames = list(traceback.walk_tb(caught.tb))
    with pytest.raises(NotPicklableError) as caught:
        offload(jobs.take).run_sync([SECRET, lambda: None])
    frames += traceback.walk_tb(caught.tb)
    for frame, _ in frames:
        if "leasepool_django" in frame.f_code.co_filename:
            assert "secret text" not in repr(frame.f_locals), frame


def test_a_pool_of_multiprocessing_works_inside_a_function(running: None) -> None:
    """Its processes can be terminated: they do not inherit how workers take signals."""
    for _ in range(20):
        squares = pools["default"].options(call_timeout=30).run_sync(jobs.squares_by_a_pool, 5)
        assert squares == [0, 1, 4, 9, 16]


def test_a_request_is_refused_by_its_type(running: None) -> None:
    """A bare one could be pickled, a real one cannot: tests must not differ from production."""
    request = RequestFactory().get("/")
    with pytest.raises(NotPicklableError, match=r"args\[0\]: .*WSGIRequest; a request belongs"):
        run_in_pool_sync(jobs.method_of, request)
    with pytest.raises(NotPicklableError, match=r"kwargs\['request'\]"):
        run_in_pool_sync(jobs.method_of, request=request)
    assert pools["default"].stats().calls_started == 0


def test_an_argument_that_does_not_unpickle_says_where_it_failed(running: None) -> None:
    """Its error would look like the function's own."""
    with pytest.raises(ValueError, match="no number") as caught:
        run_in_pool_sync(jobs.take, jobs.RefusesToArrive())
    assert "unpickled the call's arguments" in "".join(caught.value.__notes__)


def test_an_owner_is_text() -> None:
    """As everything that goes into log lines is."""
    with pytest.raises(TypeError, match="owner must be text, not 5"):
        pools["default"].options(owner=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="owner must be text, not 5"):
        pools["default"].acquire_sync(owner=5)  # type: ignore[arg-type]
