"""What comes back from a worker: exceptions; and functions found by their names."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leasepool_django.backends.process import remote
from leasepool_django.exceptions import RemoteError
from tests import exception_jobs as jobs
from tests import exception_kinds as kinds
from tests import pickling_jobs
from tests.arrivals import arrived, arrived_as_remote_error, entries, from_worker, names
from tests.process_pools import run_program

# --- exceptions that arrive as themselves --------------------------------------------------------

AS_IT_WAS = [
    jobs.fails,
    jobs.fails_within_an_expression,
    jobs.fails_below_others,
    jobs.fails_in_built_in_code,
    jobs.fails_on_an_attribute,
    jobs.fails_on_a_name,
    jobs.fails_with_a_cause,
    jobs.fails_while_handling,
    jobs.fails_with_suppressed_context,
    jobs.fails_after_an_iterator,
    jobs.fails_with_a_group,
    jobs.fails_in_a_circle,
    jobs.composes,
    jobs.frozen,
    jobs.unprintable,
]


@pytest.mark.parametrize("job", AS_IT_WAS, ids=lambda job: job.__name__)
def test_an_exception_prints_as_it_did_in_the_worker(job: Any) -> None:
    """Files, lines, marked columns, notes, causes and groups are the same, to the letter."""
    error = arrived(job)
    assert "".join(traceback.format_exception(error)) == from_worker()[0][job.__name__]["shown"]


def test_a_frame_tells_what_debuggers_and_trackers_ask_for() -> None:
    error = arrived(jobs.fails)
    (entry,) = entries(error)
    frame, code = entry.tb_frame, entry.tb_frame.f_code
    assert type(error) is ValueError
    assert error.args == ("3 numbers",)
    assert (code.co_name, code.co_qualname) == ("fails", "fails")
    assert code.co_filename == jobs.__file__
    assert code.co_firstlineno == jobs.fails.__code__.co_firstlineno
    assert frame.f_lineno == entry.tb_lineno > code.co_firstlineno
    assert frame.f_globals == {"__name__": jobs.__name__, "__file__": jobs.__file__}
    assert dict(frame.f_locals) == {}


def test_a_traceback_keeps_no_frame_of_this_process_alive() -> None:
    for entry in entries(arrived(jobs.fails_below_others)):
        assert entry.tb_frame.f_back is None


def test_links_lead_to_the_same_exception_where_they_did() -> None:
    error = arrived(jobs.fails_with_a_cause)
    assert type(error) is KeyError
    assert error.__cause__ is error.__context__
    assert type(error.__cause__) is ValueError
    assert error.__cause__.__notes__ == ["the first note", "the second note"]
    assert error.__suppress_context__
    circle = arrived(jobs.fails_in_a_circle)
    assert circle.__cause__ is not None
    assert circle.__cause__.__cause__ is circle


def test_a_context_that_is_not_shown_is_still_there() -> None:
    error = arrived(jobs.fails_with_suppressed_context)
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.filename, str(error)) == (
        2,
        "/nowhere",
        "[Errno 2] No such file: '/nowhere'",
    )
    assert error.__suppress_context__
    assert isinstance(error.__context__, ValueError)
    assert names(error.__context__) == ["fails_with_suppressed_context", "fails"]


def test_a_context_may_be_one_that_could_not_be_raised() -> None:
    error = arrived(jobs.fails_after_an_iterator)
    assert type(error) is LookupError
    assert type(error.__context__) is StopIteration


def test_a_message_composed_by_a_constructor_is_not_composed_twice() -> None:
    error = arrived(jobs.composes)
    assert isinstance(error, kinds.ComposesItsMessage)
    assert (str(error), error.args, error.code) == ("code seven", ("code seven",), "seven")


def test_an_exception_that_forbids_changes_has_its_traceback() -> None:
    error = arrived(jobs.frozen)
    assert error == kinds.Frozen(5)
    assert names(error) == ["frozen"]


def test_an_exception_may_reduce_itself_to_what_can_travel() -> None:
    error = arrived(jobs.reduces_without_args)
    assert isinstance(error, kinds.ReducesWithoutArgs)
    assert error.note == "kept"


def test_members_of_a_group_have_tracebacks_and_causes_of_their_own() -> None:
    group = arrived(jobs.fails_with_a_group)
    assert isinstance(group, ExceptionGroup)
    first, inner = group.exceptions
    assert type(first) is ZeroDivisionError
    assert names(first)[-1] == "fails_within_an_expression"
    assert type(inner) is kinds.OwnGroup
    assert type(inner.exceptions[0]) is KeyError
    assert names(inner.exceptions[0].__cause__ or first)[-1] == "fails"
    assert isinstance(inner.exceptions[1], kinds.ReducesWithoutArgs)


def test_only_the_member_that_cannot_travel_is_replaced() -> None:
    group = arrived(jobs.fails_with_a_group_of_trouble)
    assert isinstance(group, ExceptionGroup)
    inner, needy = group.exceptions
    assert isinstance(inner, ExceptionGroup)
    assert isinstance(needy, RemoteError)
    assert needy.type_name == "tests.exception_kinds.NeedsArguments"
    locked, fine = inner.exceptions
    assert isinstance(locked, RemoteError)
    assert locked.text == "locked"
    assert repr(fine) == "KeyError('fine')"


def test_what_cannot_be_raised_may_be_a_cause() -> None:
    error = arrived(jobs.unpicklable_cause)
    assert type(error) is ValueError
    assert isinstance(error.__cause__, RemoteError)
    assert error.__cause__.type_name == "tests.exception_kinds.HoldsLock"


# --- exceptions that RemoteError stands for ------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "type_name", "text"),
    [
        (jobs.exits, "SystemExit", "3"),
        (jobs.interrupts, "KeyboardInterrupt", ""),
        (jobs.closes, "GeneratorExit", ""),
        (jobs.cancels, "asyncio.exceptions.CancelledError", "stop"),
        (jobs.stops, "StopIteration", "5"),
        (jobs.stops_async, "StopAsyncIteration", ""),
        (jobs.raises_own_base, "tests.exception_kinds.OwnBase", "mine"),
        (jobs.also_cancels, "tests.exception_kinds.AlsoCancelled", "both"),
        (jobs.exits_in_a_group, "BaseExceptionGroup", "group (2 sub-exceptions)"),
        (jobs.rebuilds_as_exit, "tests.exception_kinds.RebuildsAsExit", ""),
    ],
)
def test_what_an_event_loop_would_not_survive_arrives_as_remote_error(
    job: Any, type_name: str, text: str
) -> None:
    error = arrived_as_remote_error(job)
    assert (error.type_name, error.text) == (type_name, text)
    said = f"{type_name}: {text}" if text else type_name
    assert str(error) == (
        f"The worker raised {said}. It arrives as RemoteError because raising it here would end "
        "or confuse the caller's event loop; let the function raise another subclass of Exception."
    )
    assert names(error) == [job.__name__]
    assert error.traceback_text is not None
    assert f"in {job.__name__}\n" in error.traceback_text
    assert said in error.traceback_text


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (jobs.holds_lock, "it cannot be pickled (TypeError: cannot pickle '_thread.lock' object)"),
        (jobs.reduce_raises, "it cannot be pickled (ValueError: no)"),
        (jobs.reduce_exits, "it cannot be pickled (SystemExit: 3)"),
        (jobs.local_class, "it cannot be pickled (AttributeError: Can't "),
        (jobs.unprintable_and_unpicklable, "it cannot be pickled (RuntimeError: no pickle)"),
        (jobs.needs_arguments, "it cannot be rebuilt from its pickle (TypeError: NeedsArguments."),
        (jobs.rebuild_exits, "it cannot be rebuilt from its pickle (SystemExit: 3)"),
        (
            jobs.rebuilds_as_text,
            "its __reduce__ gives a str, which is no exception",
        ),
        (jobs.rebuilt_in_worker_only, "it cannot be rebuilt from its pickle (SystemExit: not her"),
        (jobs.rebuilt_as_exit_in_parent, "raising it here would end"),
        (jobs.defined_in_main, "it cannot be rebuilt from its pickle (AttributeError: "),
        (jobs.holds_a_lot, "its pickle is too large (8,388,"),
        (jobs.fails_with_a_hidden_group, "it cannot be rebuilt from its pickle (ValueError: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_travel_arrives_as_remote_error_that_says_why(job: Any, reason: str) -> None:
    error = arrived_as_remote_error(job)
    assert f"It arrives as RemoteError because {reason}" in str(error)
    assert names(error)[-1] == job.__name__


def test_what_has_no_text_says_so() -> None:
    assert isinstance(arrived(jobs.unprintable), kinds.Unprintable)
    error = arrived_as_remote_error(jobs.unprintable_and_unpicklable)
    assert error.text == "<its str() raised RuntimeError>"


def test_remote_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(arrived(jobs.exits)))
    assert isinstance(error, RemoteError)
    assert error.type_name == "SystemExit"


def test_one_after_the_other_or_each_alone_they_arrive_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that ran all the jobs was none the worse for any of them."""

    def looks(sent: bytes) -> tuple[type[Exception], str]:
        error = remote.decode_exception(sent)
        return type(error), re.sub(r"0x[0-9a-f]+|\d+ frames", "", str(vars(error) or error.args))

    for job in set(jobs.JOBS) - {jobs.defined_in_main}:
        with monkeypatch.context() as context:
            context.setenv(kinds.IN_WORKER, "1")
            here = jobs.outcome(job)
        assert looks(here["sent"]) == looks(from_worker()[0][job.__name__]["sent"])


def test_whatever_arrives_can_be_awaited() -> None:
    """An event loop hands each to the task that waits, and goes on."""

    async def wait_for_all() -> list[str]:
        ends = []
        for name, outcome in from_worker()[0].items():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            error = remote.decode_exception(outcome["sent"])
            future.set_exception(error)
            with pytest.raises(type(error)) as raised:
                await asyncio.create_task(asyncio.wait_for(future, 5))
            assert raised.value is error
            ends.append(name)
        return ends

    assert asyncio.run(wait_for_all()) == [job.__name__ for job in jobs.JOBS]


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "job",
    [
        jobs.fails_with_a_cause,
        jobs.fails_with_a_group_of_trouble,
        jobs.holds_lock,
        jobs.reduce_exits,
    ],
)
def test_encoding_keeps_nothing_alive(job: Any) -> None:
    def run(held: pickling_jobs.Holder) -> None:
        job()

    def work() -> weakref.ref[pickling_jobs.Holder]:
        held = pickling_jobs.Holder()
        try:
            run(held)
        except BaseException as error:  # noqa: BLE001 - whatever it is
            remote.encode_exception(error, jobs.shown_locals, 1)
        return weakref.ref(held)

    assert work()() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("job", [jobs.fails_while_handling, jobs.exits, jobs.fails_with_a_group])
def test_a_decoded_exception_keeps_nothing_alive_and_goes_with_its_last_reference(
    job: Any,
) -> None:
    sent = from_worker()[0][job.__name__]["sent"]

    def wait() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        bystander = pickling_jobs.Holder()
        error = remote.decode_exception(sent)
        return weakref.ref(bystander), weakref.ref(error)

    kept = remote.decode_exception(sent)
    bystander, error = wait()
    assert bystander() is None
    assert error() is None
    assert kept.__traceback__ is not None


# --- functions -----------------------------------------------------------------------------------


def test_a_function_is_found_by_name() -> None:
    assert remote.resolve("tests.pickling_jobs:plain") is pickling_jobs.plain
    assert remote.resolve("tests.pickling_jobs:Machine.static") is pickling_jobs.Machine.static
    assert remote.resolve("tests.pickling_jobs:plain") is pickling_jobs.plain
    assert remote.resolve("builtins:len") is len


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module_here:f", ModuleNotFoundError),
        ("tests.pickling_jobs:nothing", AttributeError),
        ("tests.pickling_jobs:Machine.nothing", AttributeError),
    ],
)
def test_a_function_that_is_not_found_is_named(name: str, expected: type[Exception]) -> None:
    with pytest.raises(expected) as raised:
        remote.resolve(name)
    assert raised.value.__notes__ == [f"The worker was looking for the function {name!r}."]


def test_what_a_module_raises_on_import_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_on_import.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="no licence"):
        remote.resolve("raises_on_import:f")


def test_names_are_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MAX_RESOLVED", 2)
    monkeypatch.setattr(remote, "_resolved", {})
    for name in ("plain", "decorated", "cached", "Machine"):
        assert remote.resolve(f"tests.pickling_jobs:{name}") is getattr(pickling_jobs, name)


WITH_TBLIB = """
    import gc, weakref
    from tblib import pickling_support
    pickling_support.install()
    from leasepool_django.backends.process.remote import decode_exception, encode_exception

    class Held: pass

    def fail(held):
        kept.append(weakref.ref(held))
        try:
            raise KeyError("why")
        except KeyError as error:
            raise ExceptionGroup("all", [ValueError("what")]) from error

    kept = []
    gc.disable()
    try:
        fail(Held())
    except ExceptionGroup as error:
        data = encode_exception(error)
    print(kept[0]())
    found = decode_exception(data)
    print(type(found).__name__, found.exceptions, repr(found.__cause__))
"""


def test_tblibs_way_of_pickling_exceptions_makes_no_difference(tmp_path: Path) -> None:
    """Importing Dask, or whatever else asks for it, has every exception pickled like that."""
    pytest.importorskip("tblib")
    ended = run_program(tmp_path, WITH_TBLIB)
    assert ended.stdout == "None\nExceptionGroup (ValueError('what'),) KeyError('why')\n", (
        ended.stderr
    )
