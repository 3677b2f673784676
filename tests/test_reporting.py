"""What Django makes of a worker's exception, and of Channels around the application."""

from __future__ import annotations

import asyncio
import html
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.asgi import get_asgi_application
from django.core.signals import got_request_exception
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path
from django.views.debug import SafeExceptionReporterFilter

from leasepool_django import pools, run_in_pool_sync
from leasepool_django.asgi import LeasePoolLifespan

from . import privacy_jobs as jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


ROOT = Path(__file__).parents[1]


def failing(request: HttpRequest) -> HttpResponse:
    """Let a worker fail."""
    run_in_pool_sync(jobs.fails_with, "the very secret text")
    return HttpResponse()


def keeping(request: HttpRequest) -> HttpResponse:
    """Let a worker fail; the secret is not spelled out here, since the page shows this line."""
    run_in_pool_sync(jobs.fails_beside, " ".join(("what", "nobody", "may", "read")))
    return HttpResponse()


urlpatterns = [path("failing/", failing), path("keeping/", keeping)]


@pytest.fixture
def running(settings: Settings) -> Iterator[None]:
    """Run one process pool of one worker, and serve this module's urls."""
    settings.ROOT_URLCONF = __name__
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1, "SHUTDOWN_GRACE_SECONDS": 0}}
    yield
    pools.reset()


def test_error_reporting_is_told_once(running: None, caplog: pytest.LogCaptureFixture) -> None:
    """By the signal and by the log, in this process and not in the worker as well."""
    heard: list[Any] = []

    def receiver(**facts: Any) -> None:
        heard.append(facts)

    got_request_exception.connect(receiver)
    try:
        with caplog.at_level(logging.ERROR, "django.request"):
            response = Client(raise_request_exception=False).get("/failing/")
    finally:
        got_request_exception.disconnect(receiver)
    assert response.status_code == 500
    assert len(heard) == 1
    records = [record for record in caplog.records if record.name == "django.request"]
    assert len(records) == 1
    assert records[0].exc_info is not None


SECRET_PAGE = """
import django
from django.test import Client
from django.test.utils import override_settings

if __name__ == "__main__":
    django.setup()
    with override_settings(ROOT_URLCONF="tests.test_reporting"):
        response = Client(raise_request_exception=False).get("/keeping/")
    assert response.status_code == 500
    print(response.content.decode())
"""


def test_the_debug_page_shows_the_workers_frame_and_no_secret() -> None:
    """With its source line and variables; ``@sensitive_variables`` holds across the border."""
    ran = subprocess.run(
        [sys.executable, "-c", SECRET_PAGE],
        cwd=ROOT,
        # Settings that turn DEBUG on here and, as they are read there too, in the worker.
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.worker_settings",
            "WORKER_DEBUG": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    page = html.unescape(ran.stdout)
    assert "you have <code>DEBUG = True</code>" in page
    assert f'<code class="fname">{jobs.__file__}</code>' in page
    assert "raise ValueError(note)" in page
    assert "'20 characters'" in page
    assert "<td>secret</td>" in page
    assert SafeExceptionReporterFilter.cleansed_substitute in page
    assert "what nobody may read" not in page


def test_channels_router_inside_has_no_lifespan_and_is_served(running: None) -> None:
    """It raises for the scope; the pools start and stop all the same."""
    routing = pytest.importorskip("channels.routing", reason="Channels is not installed")
    app = LeasePoolLifespan(routing.ProtocolTypeRouter({"http": get_asgi_application()}))

    async def lifespan() -> list[str]:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent: list[str] = []
        started: list[bool] = []

        async def receive() -> dict[str, Any]:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message["type"])
            started.append(pools["default"].started)

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        assert started == [True, False]
        return sent

    assert asyncio.run(lifespan()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
