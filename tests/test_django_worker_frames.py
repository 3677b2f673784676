"""What a worker tells of an error's frames: variables under ``DEBUG``, bounded and filtered."""

from __future__ import annotations

import contextvars
import datetime as dt
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from django.utils import translation
from django.views.debug import ExceptionReporter, SafeExceptionReporterFilter

from leasepool_django import pools, run_in_pool_sync
from leasepool_django.backends.process import django_frames as frames
from leasepool_django.backends.process import django_worker as hooks
from tests import worker_jobs as jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


@pytest.fixture
def one_worker(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One worker, so that every call finds what the one before has left."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.worker_settings")
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1}}
    yield
    pools.reset()


@pytest.fixture
def debugging_worker(one_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_DEBUG", "1")


def raised_by(function: Callable[..., Any], *args: Any) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the callers look at it
        run_in_pool_sync(function, *args)
    return raised.value


def variables(error: BaseException) -> dict[str, dict[str, Any]]:
    """The variables of the worker's frames, by function."""
    return {
        frame.f_code.co_name: dict(frame.f_locals)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == jobs.__file__
    }


def test_without_debug_no_variables_travel(one_worker: None) -> None:
    seen = variables(raised_by(jobs.with_password, "ada", "pa55"))
    assert seen == {"with_password": {}, "inside": {}}


def test_under_debug_variables_travel_as_text_but_not_sensitive_ones(
    debugging_worker: None,
) -> None:
    error = raised_by(jobs.with_password, "ada", "pa55")
    seen = {name: repr(value) for name, value in variables(error)["inside"].items()}
    hidden = SafeExceptionReporterFilter.cleansed_substitute
    assert seen == {"user": "'ada'", "password": repr(hidden), "note": "'hello ada'"}


def test_a_password_is_nowhere_in_what_arrives(debugging_worker: None) -> None:
    for job in (jobs.with_password, jobs.run_async_with_password):
        error = raised_by(job, "ada", "pa55word")
        reporter = ExceptionReporter(None, type(error), error, error.__traceback__)
        html = reporter.get_traceback_html()
        worker_frames = [
            frame for frame in reporter.get_traceback_frames() if frame["filename"] == jobs.__file__
        ]
        text = repr([frame["vars"] for frame in worker_frames])
        if job is jobs.with_password:
            assert "pa55word" not in text
        else:
            [decorated] = [f for f in worker_frames if f["function"] == "with_password_async"]
            assert "pa55word" not in repr(decorated["vars"])
        assert "worker_jobs.py" in html
        assert "raise ValueError(" in html


def test_every_variable_of_a_wholly_sensitive_function_is_hidden(debugging_worker: None) -> None:
    seen = variables(raised_by(jobs.with_secrets, "t0ken"))
    assert "t0ken" not in repr(seen)
    assert set(seen["with_secrets"]) == {"token"}


def frame_of(function: Callable[..., NoReturn], *args: Any) -> FrameType:
    try:
        function(*args)
    except ValueError as error:
        entries = list(traceback.walk_tb(error.__traceback__))
        return entries[-1][0]


class Rude:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error


def hold(value: object) -> NoReturn:
    raise ValueError


@pytest.fixture
def debug(settings: Settings) -> None:
    settings.DEBUG = True


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        b"x" * 10_000_000,
        bytearray(10_000_000),
        list(range(1_000_000)),
        dict.fromkeys(range(1_000_000)),
        set(range(1_000_000)),
        10**100_000,
        [[["deep" * 1000] * 1000] * 1000] * 1000,
        translation.gettext_lazy("Yes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_representation_is_bounded_whatever_the_value(debug: None, value: object) -> None:
    shown = frames.frame_locals(frame_of(hold, value))
    assert 0 < len(shown["value"]) <= frames.LONGEST_REPR + 1


@pytest.mark.parametrize(
    "value",
    [
        1, "text", b"bytes", None, [], (), {}, set(), frozenset(), (1,), (1, 2), [1, [2, "3"]],
        {"a": {"b": (1,)}}, {1}, frozenset({1}), bytearray(b"x"), dt.UTC,
    ],
)  # fmt: skip
def test_a_small_value_is_shown_as_it_is(debug: None, value: object) -> None:
    assert frames.frame_locals(frame_of(hold, value))["value"] == repr(value)


@pytest.mark.parametrize("error", [ValueError(), RecursionError(), SystemExit(), MemoryError()])
def test_a_representation_that_raises_is_named_as_such(debug: None, error: BaseException) -> None:
    shown = frames.frame_locals(frame_of(hold, {"key": Rude(error)}))
    expected = f"{{'key': <Rude object; its repr raised {type(error).__name__}>}}"
    assert shown["value"] == expected


def test_a_value_that_holds_itself_is_shown(debug: None) -> None:
    value: list[Any] = [1]
    value.append(value)
    assert frames.frame_locals(frame_of(hold, value))["value"].startswith("[1, [1, [1,")


def test_a_filter_that_raises_costs_the_variables_only(
    debug: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def get_traceback_frame_variables(self, request: object, frame: object) -> None:
            raise ValueError("a broken filter")

    monkeypatch.setattr(frames, "_reporter_filter", Broken)
    assert frames.frame_locals(frame_of(hold, 1)) == {}
    assert "could not be shown" in caplog.text


def test_frames_of_this_package_show_nothing(debug: None) -> None:
    malformed: Any = ("de", ("not a number", "x"))
    with pytest.raises(TypeError) as raised:
        contextvars.Context().run(hooks.enter, malformed)
    frame = list(traceback.walk_tb(raised.value.__traceback__))[-1][0]
    assert frame.f_code.co_name == "enter"
    assert frames.frame_locals(frame) == {}
