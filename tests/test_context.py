"""What of a caller's context follows its calls into the workers."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from leasepool_django import NotPicklableError
from leasepool_django.conf import get_config, validate
from leasepool_django.engine import LeasedExecutorManager

from . import context_jobs as jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

REQUEST_ID = "tests.context_jobs.request_id"


@contextmanager
def manager(**options: Any) -> Iterator[LeasedExecutorManager]:
    """Run a manager of one worker."""
    managed = LeasedExecutorManager(max_pools=1, workers_per_pool=1, **options)
    managed.start_sync()
    try:
        yield managed
    finally:
        managed.stop_sync(grace=0)


def test_a_chosen_variable_has_the_callers_value_for_one_call() -> None:
    """It is set where it was set, unset where it was not, and never left over."""

    async def both(managed: LeasedExecutorManager) -> list[tuple[str, str]]:
        async def with_id(value: str) -> tuple[str, str]:
            jobs.request_id.set(value)
            return await managed.run(jobs.seen)

        first = await asyncio.create_task(with_id("r1"))
        without = await asyncio.create_task(managed.run(jobs.seen))
        second = await asyncio.create_task(with_id("r2"))
        return [first, without, second]

    with manager(context=[REQUEST_ID]) as managed:
        assert asyncio.run(both(managed)) == [
            ("r1", "nobody"),
            ("unset", "nobody"),
            ("r2", "nobody"),
        ]


def test_a_value_that_cannot_travel_is_not_blamed_on_the_arguments() -> None:
    context = contextvars.Context()
    with manager(context=[REQUEST_ID]) as managed:
        context.run(jobs.request_id.set, threading.Lock())  # type: ignore[arg-type]
        with pytest.raises(NotPicklableError) as caught:
            context.run(managed.run_sync, jobs.seen)
    assert caught.value.path == f"CONTEXT['{REQUEST_ID}']"
    assert str(caught.value).startswith(
        "The context of tests.context_jobs.seen cannot be sent to a worker: "
        f"CONTEXT['{REQUEST_ID}']: _thread.lock. A lock works in one process only"
    )


def test_an_object_with_capture_and_apply_carries_what_it_likes() -> None:
    """capture() runs in the caller's context, apply() in the call's."""

    async def run(managed: LeasedExecutorManager) -> tuple[str, str]:
        jobs.request_id.set("four")
        return await managed.run(jobs.seen)

    with manager(context=["tests.context_jobs.doubling"]) as managed:
        assert asyncio.run(run(managed)) == ("unset", "tenant 8")


def test_variables_that_were_not_chosen_stay_at_home() -> None:
    """Without CONTEXT a call runs in a fresh context."""
    token = jobs.tenant.set("me")
    try:
        with manager() as managed:
            assert managed.run_sync(jobs.seen) == ("unset", "nobody")
    finally:
        jobs.tenant.reset(token)


def test_a_filter_here_sees_the_callers_request_id_on_a_workers_record() -> None:
    """Records are handled in the caller's context, so request-id filters work."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage(), jobs.request_id.get("none")))

    logger = logging.getLogger("tests.context")
    handler = Handler()
    logger.addHandler(handler)

    async def run(managed: LeasedExecutorManager, value: str) -> None:
        jobs.request_id.set(value)
        await managed.run(jobs.log_something)

    async def two(managed: LeasedExecutorManager) -> None:
        await asyncio.gather(run(managed, "a"), run(managed, "b"))

    try:
        with manager(forward_process_logs=True) as managed:
            asyncio.run(two(managed))
    finally:
        logger.removeHandler(handler)
    assert sorted(seen) == [("from the worker", "a"), ("from the worker", "b")]


def test_a_workers_span_is_a_child_of_the_callers() -> None:
    """The trace context that was current at the call is current in the function."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer(__name__)
    with manager(context=["leasepool_django.tracing.trace_context"]) as managed:
        with tracer.start_as_current_span("request") as span:
            context = span.get_span_context()
            assert managed.run_sync(jobs.span_parent) == (context.trace_id, context.span_id)
        assert managed.run_sync(jobs.span_parent) == (0, 0)


class Carrier:
    """Can carry, but only as an object."""

    def capture(self) -> int:
        return 0

    def apply(self, value: int) -> None:
        pass


class ClassCarrier:
    """Can carry, and needs no object."""

    @classmethod
    def capture(cls) -> int:
        return 0

    @staticmethod
    def apply(value: int) -> None:
        pass


class AsynchronousCarrier:
    """Cannot carry: nobody awaits it."""

    async def capture(self) -> int:
        return 0

    async def apply(self, value: int) -> None:
        pass


class Forgetful(Carrier):
    """Has no use for what was captured."""

    def apply(self) -> None:  # type: ignore[override]  # the mistake
        pass


asynchronous = AsynchronousCarrier()
forgetful = Forgetful()
HERE = __name__


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.context_jobs.not_a_carrier", "it is of type object, without capture()"),
        ("tests.context_jobs.missing", "cannot be imported: AttributeError"),
        ("nowhere.at_all", "cannot be imported: ModuleNotFoundError"),
        (f"{HERE}.Carrier", "missing a required argument: 'self'; name an object of the class"),
        (f"{HERE}.asynchronous", "its capture() is a coroutine function"),
        (f"{HERE}.forgetful", "its apply() cannot be called like that: too many positional"),
    ],
)
def test_a_carrier_that_is_none_is_refused_with_its_path(
    settings: Settings, path: str, reason: str
) -> None:
    """In settings it is a mistake with an id; in the engine an error at construction."""
    settings.LEASEPOOL = {"default": {"CONTEXT": [path]}}
    with pytest.raises(ImproperlyConfigured, match="E017") as caught:
        get_config()
    assert f"context names {path!r}" in str(caught.value)
    assert reason in str(caught.value)
    with pytest.raises((TypeError, ValueError), match=re.escape(f"context names {path!r}")):
        LeasedExecutorManager(max_pools=1, context=[path])


def test_a_class_whose_methods_need_no_object_is_a_carrier(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"CONTEXT": [f"{HERE}.ClassCarrier"]}}
    assert get_config()["default"].context == (f"{HERE}.ClassCarrier",)


def test_settings_hand_the_carriers_to_the_backends_that_carry(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {"CONTEXT": [REQUEST_ID]},
        "threads": {"CONTEXT": [REQUEST_ID], "BACKEND": "thread"},
        "others": {
            "CONTEXT": [REQUEST_ID],
            "BACKEND": "concurrent.futures.ProcessPoolExecutor",
        },
    }
    configs = get_config()
    for alias in ("default", "threads"):
        assert configs[alias].manager_kwargs()["context"] == (REQUEST_ID,)
    assert "context" not in configs["others"].manager_kwargs()


def test_every_wrong_path_is_named_at_once(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"CONTEXT": ["nowhere.first", "nowhere.second"]}}
    _, [problem] = validate()
    assert "'nowhere.first'" in problem.message
    assert "'nowhere.second'" in problem.message
