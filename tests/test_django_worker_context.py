"""What a call takes along of its caller's language and time zone, and how it is found out."""

from __future__ import annotations

import contextvars
import datetime as dt
import functools
import threading
import types
import zoneinfo
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from asgiref.local import Local
from django.utils import timezone, translation

from leasepool_django.backends.process import django_worker as hooks

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


def in_context(
    language: str | None = None, zone: dt.tzinfo | str | None = None, *, deactivated: bool = False
) -> hooks.Captured | None:
    """Capture in a context of its own, with this active."""

    def capture() -> hooks.Captured | None:
        if language is not None:
            translation.activate(language)
        if deactivated:
            translation.deactivate_all()
        if zone is not None:
            timezone.activate(zone)
        assert len(hooks.capture() or ()) == 3  # a test run tells workers of its databases too
        with mock.patch.object(hooks, "_mail", {}):
            return hooks.capture()

    return contextvars.Context().run(capture)


class Elder:
    """How ``asgiref.local.Local`` kept its values before it noted the thread, or otherwise."""

    def __init__(self, data: object) -> None:
        self._storage = self
        self._data = data


@pytest.mark.parametrize(("threads", "found"), [("the same", "value"), ("another", None)])
def test_what_a_local_has_is_seen_without_asking_it(threads: str, found: str | None) -> None:
    module = types.SimpleNamespace(_active=Local())
    peek = functools.partial(hooks.active_value, module)

    def run() -> Any:
        assert peek() is None
        module._active.other = "something"
        assert peek() is None
        module._active.value = "value"
        assert peek() == "value"
        if threads == "the same":
            return contextvars.copy_context().run(peek)
        with ThreadPoolExecutor(1) as executor:  # 3.14 can be told to hand contexts on
            return executor.submit(contextvars.copy_context().run, peek).result()

    assert contextvars.Context().run(run) == found


def test_what_another_local_has_is_seen_or_left_to_it() -> None:
    data: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("data")
    elder = types.SimpleNamespace(_active=Elder(data))
    assert hooks.active_value(elder) is None
    token = data.set({"value": "value"})
    assert hooks.active_value(elder) == "value"
    data.reset(token)
    for kept in ({"value": data}, data.name, threading.local()):
        assert hooks.active_value(types.SimpleNamespace(_active=Elder(kept))) is hooks.UNKNOWN
    assert hooks.active_value(types.SimpleNamespace(_active=object())) is hooks.UNKNOWN


class Odd(dt.tzinfo):
    """A zone that only answers for an instant, as dateutil's do."""

    def utcoffset(self, when: dt.datetime | None, /) -> dt.timedelta | None:
        return None if when is None else dt.timedelta(hours=3)

    def dst(self, when: dt.datetime | None, /) -> dt.timedelta | None:
        return dt.timedelta()

    def tzname(self, when: dt.datetime | None, /) -> str | None:
        return None

    def __str__(self) -> str:
        return "odd"


class Pytz(Odd):
    zone = "Etc/GMT-3"


@pytest.mark.parametrize(
    ("language", "zone", "captured"),
    [
        (None, None, None),
        ("en", "UTC", None),
        ("de", None, ("de", "UTC")),
        (None, "Europe/Berlin", ("en", "Europe/Berlin")),
        (None, zoneinfo.ZoneInfo("Asia/Tokyo"), ("en", "Asia/Tokyo")),
        (None, dt.UTC, ("en", (0.0, "UTC"))),
        (None, timezone.get_fixed_timezone(90), ("en", (5400.0, "+0130"))),
        (None, dt.timezone(dt.timedelta(seconds=-1)), ("en", (-1.0, "UTC-00:00:01"))),
        (None, Odd(), ("en", (10800.0, "odd"))),
        (None, Pytz(), ("en", "Etc/GMT-3")),
    ],
)
def test_what_is_active_is_captured_and_activated_again(
    language: str | None, zone: dt.tzinfo | str | None, captured: hooks.Captured | None
) -> None:
    assert in_context(language, zone) == captured

    def enter() -> tuple[str | None, dt.timedelta | None]:
        hooks.enter(captured)
        return translation.get_language(), timezone.localtime().utcoffset()

    def expected() -> tuple[str | None, dt.timedelta | None]:
        translation.activate(language or "en")
        if zone is not None:
            timezone.activate(zone)
        return translation.get_language(), timezone.localtime().utcoffset()

    assert contextvars.Context().run(enter) == contextvars.Context().run(expected)


def test_translations_that_are_switched_off_stay_off() -> None:
    captured = in_context(deactivated=True)
    assert captured == (None, "UTC")

    def enter() -> str | None:
        hooks.enter(captured)
        return translation.get_language()

    assert contextvars.Context().run(enter) is None


def test_overridden_settings_are_carried_since_workers_do_not_know_them(
    settings: Settings,
) -> None:
    settings.LANGUAGE_CODE = "de"
    settings.TIME_ZONE = "Europe/Berlin"
    assert in_context() == ("de", "Europe/Berlin")
    assert in_context("en", "UTC") is None


def test_without_translations_the_language_of_the_settings_is_meant(settings: Settings) -> None:
    translation.get_language()  # what comes first decides for the life of the process
    settings.USE_I18N = False
    assert in_context() is None
