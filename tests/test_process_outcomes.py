"""Each outcome of a function reaches its own caller, as itself or as an error that says why not."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

import pytest

from leasepool_django import NotPicklableError, RemoteError
from tests import process_jobs as jobs
from tests.process_pools import CALLERS, Caller, running

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)


@each_caller
def test_an_exception_arrives_as_itself_with_the_workers_frames(caller: Caller) -> None:
    with running() as manager:
        error = caller.outcome(manager, jobs.raise_chained)
    assert type(error) is jobs.OddError
    assert error.code == 8
    assert error.args == ("could not divide", 8)
    frames = traceback.extract_tb(error.__traceback__)
    raised = [frame for frame in frames if frame.filename == jobs.__file__]
    assert [frame.name for frame in raised] == ["raise_chained"]
    assert raised[0].line == 'raise OddError("could not divide", 8) from error'
    cause = error.__cause__
    assert type(cause) is ZeroDivisionError
    assert [frame.name for frame in traceback.extract_tb(cause.__traceback__)] == [
        "raise_chained",
        "_divide",
    ]


@each_caller
def test_a_group_arrives_with_its_members(caller: Caller) -> None:
    with running() as manager:
        group = caller.outcome(manager, jobs.raise_group)
    assert type(group) is ExceptionGroup
    one, two = group.exceptions
    assert (type(one), one.args) == (ValueError, ("one",))
    assert isinstance(two, jobs.OddError)
    assert two.code == 2


# The name of what is raised; its type's name and text; words that say why it does not come itself.
REMOTE = [
    ("StopIteration", "StopIteration", "a value", "event loop"),
    ("StopAsyncIteration", "StopAsyncIteration", "no more", "event loop"),
    ("SystemExit", "SystemExit", "5", "event loop"),
    ("KeyboardInterrupt", "KeyboardInterrupt", "", "event loop"),
    ("GeneratorExit", "GeneratorExit", "closing", "event loop"),
    ("CancelledError", "asyncio.exceptions.CancelledError", "from a worker", "event loop"),
    ("OwnBaseException", "tests.process_jobs.OwnBaseException", "base", "event loop"),
    ("BaseExceptionGroup", "BaseExceptionGroup", "all (2 sub-exceptions)", "event loop"),
    ("KeywordError", "tests.process_jobs.KeywordError", "bad name", "cannot be rebuilt"),
    ("LockedError", "tests.process_jobs.LockedError", "holds a lock", "cannot be pickled"),
    ("ReduceRaisesError", "tests.process_jobs.ReduceRaisesError", "r", "RuntimeError: no reduct"),
    ("ReduceExitsError", "tests.process_jobs.ReduceExitsError", "r", "SystemExit: 9"),
    ("LocalError", "tests.process_jobs.LocalError", "local", "cannot be pickled"),
]


@each_caller
def test_what_cannot_arrive_as_itself_arrives_as_remote_error(caller: Caller) -> None:
    """And the worker lives on, whatever it was."""
    with running() as manager:
        pid = caller(manager, os.getpid)
        for name, type_name, text, reason in REMOTE:
            error = caller.outcome(manager, jobs.raise_named, name)
            assert type(error) is RemoteError, name
            assert error.type_name == type_name
            assert error.text == text
            assert error.traceback_text is not None
            assert "in raise_named" in error.traceback_text
            assert f"The worker raised {type_name}" in str(error)
            assert reason in str(error)
            assert caller(manager, os.getpid) == pid


@each_caller
def test_a_result_that_cannot_be_pickled_is_an_error_that_names_the_culprit(
    caller: Caller,
) -> None:
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.return_nested_lock)
        assert type(error) is NotPicklableError
        assert (error.path, error.type_name) == ("result['client'].lock", "_thread.lock")
        assert str(error).startswith(
            "The result of tests.process_jobs.return_nested_lock cannot be sent back from the "
            "worker: result['client'].lock: _thread.lock."
        )
        error = caller.outcome(manager, jobs.return_lambda)
        assert type(error) is NotPicklableError
        assert "The result of tests.process_jobs.return_lambda" in str(error)
        assert "lambda" in str(error)
        assert caller(manager, os.getpid) == pid


@each_caller
def test_a_result_whose_pickling_exits_is_an_error_for_its_caller_only(caller: Caller) -> None:
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.return_exiting)
        assert type(error) is RemoteError
        assert error.type_name == "SystemExit"
        assert caller(manager, os.getpid) == pid


@each_caller
@pytest.mark.parametrize(
    "exception", [ValueError, SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit]
)
def test_a_result_that_cannot_be_unpickled_here_is_an_error_for_its_caller_only(
    caller: Caller, exception: type[BaseException]
) -> None:
    """Also when its unpickling raises what would end this process."""
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.return_exploding, exception)
        assert type(error) is NotPicklableError
        assert error.path == "result"
        assert "The result of tests.process_jobs.return_exploding cannot be" in str(error)
        assert f"{exception.__name__}: on arrival" in str(error)
        assert caller(manager, os.getpid) == pid


@each_caller
def test_an_argument_that_cannot_be_unpickled_there_is_an_error_for_its_caller_only(
    caller: Caller,
) -> None:
    with running() as manager:
        pid = caller(manager, os.getpid)
        error = caller.outcome(manager, jobs.echo, jobs.ExplodesOnArrival())
        assert type(error) is ValueError
        assert str(error) == "on arrival"
        error = caller.outcome(manager, jobs.echo, jobs.ExplodesOnArrival(SystemExit))
        assert type(error) is RemoteError
        assert caller(manager, os.getpid) == pid


def test_a_function_that_the_worker_cannot_import_is_its_callers_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is there when this process imports it, and gone when the worker does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "short_lived.py"
    source.write_text("def work(): pass\n")
    with running() as manager:
        pid = manager.run_sync(os.getpid)
        short_lived = importlib.import_module("short_lived")
        source.unlink()
        with pytest.raises(ModuleNotFoundError, match="short_lived") as caught:
            manager.run_sync(short_lived.work)
        assert caught.value.__notes__ == [
            "The worker was looking for the function 'short_lived:work'."
        ]
        assert manager.run_sync(os.getpid) == pid
        assert manager.stats().workers_crashed == 0
    del sys.modules["short_lived"]


def test_each_call_runs_in_a_fresh_context() -> None:
    with running() as manager:
        assert manager.run_sync(jobs.swap_context_value, "first") == "none"
        assert manager.run_sync(jobs.swap_context_value, "second") == "none"
