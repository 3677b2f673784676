"""Every kind of exception, raised in real workers: the right error, and a worker that lives on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from leasepool_django import RemoteError
from leasepool_django.backends.process.errors import note
from tests import exception_jobs as jobs
from tests import exception_kinds as kinds
from tests import process_jobs
from tests.arrivals import arrived
from tests.process_pools import running

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])

# Its class is made by the process that raises it.
NOT_COMPARED = {jobs.defined_in_main}


def outcome(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is what the caller got
        return error
    raise AssertionError("nothing was raised")


def notes(error: Exception) -> list[str]:
    """Return its notes; how many frames it had depends on who called."""
    return [re.sub(r"\d+ frames", "n frames", text) for text in vars(error).get("__notes__", [])]


@each_method
def test_every_kind_of_exception_costs_its_own_call_only(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same worker runs all of them, one after the other, with a good call after each."""
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setenv(kinds.IN_WORKER, "1")  # workers keep it
            manager = stack.enter_context(running(mp_context=method))
        pid = manager.run_sync(os.getpid)
        for job in jobs.JOBS:
            error = outcome(lambda job=job: manager.run_sync(job))  # type: ignore[misc]
            if job not in NOT_COMPARED:
                expected = arrived(job)
                assert type(error) is type(expected), job
                assert notes(error) == notes(expected), job
                if isinstance(error, RemoteError):
                    assert isinstance(expected, RemoteError)
                    assert (error.type_name, error.text) == (expected.type_name, expected.text)
            assert manager.run_sync(os.getpid) == pid, job
        assert manager.stats().workers_crashed == 0


@each_method
def test_arguments_may_raise_what_forbids_changes(method: str) -> None:
    with running(mp_context=method) as manager:
        pid = manager.run_sync(os.getpid)
        with pytest.raises(kinds.Unchangeable, match="on arrival") as caught:
            manager.run_sync(process_jobs.echo, kinds.RaisesOnArrival())
        assert caught.value.__notes__ == [
            "Raised in the worker, when it unpickled the call's arguments."
        ]
        assert manager.run_sync(os.getpid) == pid


DJANGO_HOOKS = {"hooks": "leasepool_django.backends.process.django_worker"}


@pytest.mark.parametrize("options", [{}, DJANGO_HOOKS], ids=["plain", "django"])
@pytest.mark.parametrize("max_shared", [0, 1 << 30], ids=["by socket", "by memory"])
def test_what_arguments_raise_has_every_frame_of_the_projects(
    options: dict[str, Any], max_shared: int
) -> None:
    """None of the worker's, whichever way the argument has come."""
    with running(max_shared_bytes=max_shared, **options) as manager:
        for size in (10, 200_000):
            payload = process_jobs.ExplodingPayload(size)
            error = outcome(lambda payload=payload: manager.run_sync(len, payload))  # type: ignore[misc]
            assert str(error) == f"{size} bytes"
            assert worker_frames(error) == ["__setstate__", "check_state"]
        error = outcome(lambda: manager.run_sync(process_jobs.raise_odd))
        assert worker_frames(error) == ["raise_odd"]


@pytest.mark.parametrize("options", [{}, DJANGO_HOOKS], ids=["plain", "django"])
def test_what_a_carrier_raises_has_every_frame_of_the_projects(options: dict[str, Any]) -> None:
    carrier = "tests.process_jobs.exploding_carrier"
    with running(context=[carrier], **options) as manager:
        error = outcome(lambda: manager.run_sync(process_jobs.echo, 1))
        assert worker_frames(error) == ["apply", "check_state"]


def worker_frames(error: Exception) -> list[str]:
    """The functions of the frames that come from the worker."""
    entries = error.__traceback__
    found = []
    while entries is not None:
        # A frame that was rebuilt has no caller.
        if entries.tb_frame.f_back is None:
            found.append(entries.tb_frame.f_code.co_name)
        entries = entries.tb_next
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, ["more"]), (("one",), ["one", "more"]), (["one"], ["one", "more"]), (7, ["more"])],
)
def test_a_note_is_added_whatever_was_there(before: object, after: list[str]) -> None:
    error = kinds.Unchangeable("noted")
    if before is not None:
        vars(error)["__notes__"] = before
    note(error, "more")
    assert error.__notes__ == after


def test_a_note_is_added_without_the_code_of_a_list_of_ones_own() -> None:
    notes = kinds.UnreadableNotes(["one"])
    error = ValueError("noted")
    error.__notes__ = notes
    note(error, "more")
    assert len(notes) == 2
