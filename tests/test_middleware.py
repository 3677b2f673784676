"""No capacity becomes ``503`` with an honest ``Retry-After``, in any view."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory
from django.urls import path
from django.views import View

from leasepool_django import (
    LeaseExpiredError,
    LeaseTimeoutError,
    LeaseUnavailableError,
    pools,
)
from leasepool_django.middleware import LeasePoolMiddleware, no_capacity_response

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

pytestmark = pytest.mark.urls(__name__)


def fine(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


async def fine_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


def unavailable(request: HttpRequest) -> HttpResponse:
    raise LeaseUnavailableError("secret owner 'invoices' holds all", retry_after=4.2)


def closed(request: HttpRequest) -> HttpResponse:
    return HttpResponse("closed for today", status=503)


def waits_for_itself(request: HttpRequest) -> HttpResponse:
    raise LeaseUnavailableError("it would wait for itself", waits_for_itself=True)


async def timed_out(request: HttpRequest) -> HttpResponse:
    raise LeaseTimeoutError("none came", waited=2.0, retry_after=0.1)


async def timed_out_late(request: HttpRequest) -> HttpResponse:
    raise LeaseTimeoutError("none came", waited=2.0, retry_after=7.5)


class Full(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        """Ask twice for the one lease there is, which must not wait for itself."""
        async with await pools["default"].acquire():
            await pools["default"].acquire(wait=False)
        raise AssertionError("two leases at once")


async def grouped(request: HttpRequest) -> HttpResponse:
    async with asyncio.TaskGroup() as group:
        group.create_task(timed_out(request))
        group.create_task(timed_out_late(request))
    raise AssertionError


def other(request: HttpRequest) -> HttpResponse:
    raise LeaseExpiredError("held too long")


urlpatterns = [
    path("fine", fine),
    path("fine-async", fine_async),
    path("unavailable", unavailable),
    path("waits-for-itself", waits_for_itself),
    path("closed", closed),
    path("timed-out", timed_out),
    path("full", Full.as_view()),
    path("grouped", grouped),
    path("other", other),
]

Getter = Callable[..., Any]


@pytest.fixture(params=["sync", "async", "behind sync middleware"])
def get(request: pytest.FixtureRequest, settings: Settings) -> Getter:
    """Fetch a path through the middleware, in both kinds of stack."""
    settings.MIDDLEWARE = ["leasepool_django.middleware.LeasePoolMiddleware"]
    if request.param == "behind sync middleware":
        settings.MIDDLEWARE.insert(0, f"{__name__}.sync_only")
    if request.param == "sync":
        return Client().get

    def fetch(url: str, **options: Any) -> Any:
        async def once() -> Any:
            return await AsyncClient().get(url, **options)

        return asyncio.run(once())

    return fetch


def sync_only(get_response: Callable[[HttpRequest], HttpResponse]) -> Any:
    def middleware(request: HttpRequest) -> HttpResponse:
        return get_response(request)

    return middleware


@pytest.mark.parametrize("url", ["/fine", "/fine-async"])
def test_other_answers_pass(get: Getter, url: str) -> None:
    response = get(url)
    assert (response.status_code, response.content) == (200, b"fine")


def test_no_lease_is_a_page_with_retry_after(get: Getter) -> None:
    response = get("/unavailable")
    assert response.status_code == 503
    assert response["Retry-After"] == "5"
    assert response["Cache-Control"] == "no-store"
    assert response["Content-Type"].startswith("text/html")
    assert b"try again in 5 seconds" in response.content
    assert b"invoices" not in response.content


def test_the_reason_is_one_warning_and_no_mail_to_the_admins(
    get: Getter, settings: Settings, caplog: pytest.LogCaptureFixture, mailoutbox: list[Any]
) -> None:
    settings.DEBUG = False
    settings.ADMINS = [("Ada", "ada@example.org")]
    get("/unavailable")
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (record.name, record.levelname) == ("leasepool_django.middleware", "WARNING")
    assert record.getMessage() == (
        "/unavailable is answered 503 Service Unavailable: secret owner 'invoices' holds all"
    )
    assert mailoutbox == []


# Django 6.1 warns of how the oldest Django here spells these settings.
@pytest.mark.filterwarnings("ignore:.*(default mailer|ADMINS setting)")
def test_other_answers_of_this_status_are_mailed_as_ever(
    get: Getter, settings: Settings, mailoutbox: list[Any]
) -> None:
    settings.DEBUG = False
    settings.ADMINS = [("Ada", "ada@example.org")]
    get("/closed")
    assert len(mailoutbox) == 1


def test_a_path_cannot_forge_a_record(caplog: pytest.LogCaptureFixture) -> None:
    request = RequestFactory().get("/a%0AERROR all is lost")
    no_capacity_response(request, LeaseUnavailableError("full"))
    assert "\n" not in caplog.messages[0]


def test_json_is_given_to_who_prefers_it(get: Getter) -> None:
    response = get("/timed-out", headers={"Accept": "application/json"})
    assert response.status_code == 503
    assert response["Retry-After"] == "1"
    assert response["Content-Type"] == "application/json"
    assert response.json() == {
        "error": "no_capacity",
        "detail": "All workers are in use. Please try again in 1 second.",
        "retry_after": 1,
    }


def test_a_full_pool_is_told_with_the_engines_own_estimate(get: Getter, settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"BACKEND": "thread", "WORKERS_PER_POOL": 1}}
    response = get("/full")
    assert response.status_code == 503
    assert int(response["Retry-After"]) >= 1


def test_a_task_that_would_wait_for_itself_is_a_mistake_and_not_told_to_come_back(
    get: Getter,
) -> None:
    with pytest.raises(LeaseUnavailableError, match="it would wait for itself"):
        get("/waits-for-itself")


def test_errors_gathered_by_a_task_group_count_when_all_are_of_this_kind(get: Getter) -> None:
    response = get("/grouped")
    assert response.status_code == 503
    assert response["Retry-After"] == "8"


def test_a_mistake_among_gathered_errors_is_not_hidden() -> None:
    middleware = LeasePoolMiddleware(fine)
    mixed = ExceptionGroup("mixed", [LeaseUnavailableError("full"), ValueError("a mistake")])
    assert middleware.process_exception(RequestFactory().get("/"), mixed) is None


def test_other_errors_are_not_touched(get: Getter) -> None:
    with pytest.raises(LeaseExpiredError):
        get("/other")


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/html"),
        ("*/*", "text/html"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("text/html, application/json;q=0.5", "text/html"),
        ("image/png", "text/html"),
    ],
)
def test_html_and_json_are_negotiated(accept: str | None, content_type: str) -> None:
    headers = {"Accept": accept} if accept is not None else {}
    request = RequestFactory().get("/", headers=headers)
    response = no_capacity_response(request, LeaseUnavailableError("full"))
    assert response["Content-Type"].partition(";")[0] == content_type


@pytest.mark.parametrize(
    ("estimate", "seconds"),
    [(None, 1), (0.0, 1), (-3.0, 1), (0.2, 1), (1.0, 1), (1.01, 2), (math.inf, 1), (math.nan, 1)],
)
def test_retry_after_is_the_estimate_in_whole_seconds(estimate: float | None, seconds: int) -> None:
    response = no_capacity_response(None, LeaseUnavailableError("full", retry_after=estimate))
    assert response["Retry-After"] == str(seconds)
