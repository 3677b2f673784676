"""Jobs that raise, and what a worker would send of it.

``main`` runs them all, one after the other, in a process of its own.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any, NoReturn

from leasepool_django.backends.process import remote
from tests import exception_kinds as kinds

# Put together, so that it is in no line of source that a traceback shows.
PASSWORD = "-".join(["open", "sesame"])


def fails(password: str = PASSWORD) -> NoReturn:
    numbers = [1, 2, 3]
    raise ValueError(f"{len(numbers)} numbers")


def without_lines() -> FunctionType:
    """Give a function whose code knows of no lines, as some generated code does."""
    code = fails.__code__.replace(co_linetable=b"")
    return FunctionType(code, globals(), argdefs=fails.__defaults__)


def fails_within_an_expression() -> float:
    total, count = 6, 0
    return 2 * (
        total / count
    ) + total  # fmt: skip


def fails_below_others() -> list[float]:
    return [fails_within_an_expression() for _ in range(2)]


def fails_in_built_in_code() -> int:
    return int("forty-two")


def fails_on_an_attribute() -> object:
    """The exception refers to the lock, which cannot be pickled."""
    return threading.Lock().shut  # type: ignore[attr-defined]


def fails_on_a_name() -> object:
    return nowhere_defined  # type: ignore[name-defined]  # noqa: F821 - that is the fault


def fails_with_a_cause() -> None:
    try:
        fails()
    except ValueError as error:
        error.add_note("the first note")
        error.add_note("the second note")
        raise KeyError("outer") from error


def fails_while_handling() -> None:
    try:
        fails()
    except ValueError:
        raise kinds.ComposesItsMessage(7)  # noqa: B904 - the context is what is tested


def fails_with_suppressed_context() -> None:
    try:
        fails()
    except ValueError:
        raise OSError(2, "No such file", "/nowhere") from None


def fails_after_an_iterator() -> None:
    """A context may be of any kind, as it is not raised."""
    try:
        next(iter(()))
    except StopIteration:
        raise LookupError("empty")  # noqa: B904 - the context is what is tested


def caught(job: Callable[[], object]) -> Exception:
    try:
        job()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError


def fails_with_a_group() -> None:
    inner = kinds.OwnGroup(
        "inner", [caught(fails_with_a_cause), kinds.ReducesWithoutArgs("a note")]
    )
    raise ExceptionGroup("outer", [caught(fails_below_others), inner])


def fails_with_a_group_of_trouble() -> None:
    inner = ExceptionGroup("inner", [kinds.HoldsLock("locked"), KeyError("fine")])
    raise ExceptionGroup("outer", [inner, kinds.NeedsArguments(1, detail="lost")])


def fails_with_a_large_group() -> None:
    raise ExceptionGroup("large", [ValueError(str(number)) for number in range(1_500)])


def fails_with_a_deep_group() -> None:
    error: Exception = ValueError("the innermost")
    for _ in range(50):
        error = ExceptionGroup("deep", [error])
    raise error


def fails_with_a_hidden_group() -> None:
    members: list[Exception] = [ValueError("member")]
    group = ExceptionGroup("circular", members)
    members.append(group)
    raise group


def fails_in_a_circle() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def fails_in_a_long_chain() -> None:
    error = ValueError("the oldest")
    for number in range(500):
        newer = ValueError(str(number))
        newer.__cause__ = error
        error = newer
    raise error


def recurses(depth: int = 0) -> int:
    return recurses(depth + 1) + 1


def composes() -> None:
    raise kinds.ComposesItsMessage("seven")


def frozen() -> None:
    raise kinds.Frozen(5)


def unchangeable() -> None:
    raise kinds.Unchangeable("as it is")


def reduces_without_args() -> None:
    raise kinds.ReducesWithoutArgs("kept", threading.Lock())


def exits() -> None:
    sys.exit(3)


def interrupts() -> None:
    raise KeyboardInterrupt


def closes() -> None:
    raise GeneratorExit


def cancels() -> None:
    raise asyncio.CancelledError("stop")


def stops() -> None:
    raise StopIteration(5)


def stops_async() -> None:
    raise StopAsyncIteration


def raises_own_base() -> None:
    raise kinds.OwnBase("mine")


def also_cancels() -> None:
    raise kinds.AlsoCancelled("both")


def exits_in_a_group() -> None:
    raise BaseExceptionGroup("group", [SystemExit(3), ValueError("other")])


def needs_arguments() -> None:
    raise kinds.NeedsArguments(4, detail="teapot")


def holds_lock() -> None:
    raise kinds.HoldsLock("locked")


def holds_a_lot() -> None:
    raise ValueError(b"x" * (remote.MAX_PICKLE_BYTES + 1))


def says_a_lot() -> None:
    raise kinds.HoldsLock("y" * 1_000_000)


def reduce_raises() -> None:
    raise kinds.ReduceRaises("plain text")


def reduce_exits() -> None:
    raise kinds.ReduceExits


def rebuild_exits() -> None:
    raise kinds.RebuildExits


def rebuilds_as_text() -> None:
    raise kinds.RebuildsAsText


def rebuilds_as_exit() -> None:
    raise kinds.RebuildsAsExit


def rebuilt_in_worker_only() -> None:
    raise kinds.RebuiltInWorkerOnly("there")


def rebuilt_as_exit_in_parent() -> None:
    raise kinds.RebuiltAsExitInParent


def unprintable() -> None:
    raise kinds.Unprintable


def unprintable_and_unpicklable() -> None:
    raise kinds.UnprintableAndUnpicklable


def unpicklable_cause() -> None:
    raise ValueError("above") from kinds.HoldsLock("below")


def local_class() -> None:
    class Local(Exception):  # noqa: N818
        """Cannot be found by name."""

    raise Local("local")


def defined_in_main() -> None:
    """Raise an exception whose class the test's process does not have."""
    here = type("OfMain", (Exception,), {"__module__": "__main__"})
    setattr(sys.modules["__main__"], "OfMain", here)  # noqa: B010 - it has no such attribute yet
    raise here("of main")


def hostile_notes() -> None:
    error = ValueError("noted")
    error.__notes__ = kinds.HostileNotes(["one"])
    raise error


def unreadable_notes() -> None:
    error = kinds.HoldsLock("noted")
    error.__notes__ = kinds.UnreadableNotes(["one"])
    raise error


def odd_notes() -> None:
    error = ValueError("noted")
    error.__notes__ = "not a list"  # type: ignore[assignment]
    raise error


def notes_in_a_tuple() -> None:
    error = ValueError("noted")
    error.__notes__ = ("one",)  # type: ignore[assignment]
    raise error


def many_notes() -> None:
    error = ValueError("noted")
    for number in range(1_000):
        error.add_note(str(number))
    raise kinds.HoldsLock("with notes") from error


JOBS: tuple[Callable[[], object], ...] = (
    fails, fails_within_an_expression, fails_below_others, fails_in_built_in_code,
    fails_on_an_attribute, fails_on_a_name,
    fails_with_a_cause, fails_while_handling, fails_with_suppressed_context,
    fails_after_an_iterator, fails_with_a_group, fails_with_a_group_of_trouble,
    fails_with_a_large_group, fails_with_a_deep_group, fails_with_a_hidden_group,
    fails_in_a_circle, fails_in_a_long_chain, recurses, composes, frozen, unchangeable,
    reduces_without_args, exits, interrupts, closes, cancels, stops, stops_async,
    raises_own_base, also_cancels,
    exits_in_a_group, needs_arguments, holds_lock, holds_a_lot, says_a_lot, reduce_raises,
    reduce_exits, rebuild_exits, rebuilds_as_text, rebuilds_as_exit, rebuilt_in_worker_only,
    rebuilt_as_exit_in_parent, unprintable, unprintable_and_unpicklable, unpicklable_cause,
    local_class, defined_in_main, hostile_notes, unreadable_notes, odd_notes,
    notes_in_a_tuple, many_notes,
)  # fmt: skip


def shown_locals(frame: FrameType) -> dict[str, str]:
    """Represent a frame's variables, but passwords."""
    return {k: "***" if k == "password" else repr(v) for k, v in frame.f_locals.items()}


def outcome(job: Callable[[], object]) -> dict[str, Any]:
    """Give what a worker would send of ``job``'s exception, and how it looks in the worker."""
    try:
        job()
    except BaseException as error:  # noqa: BLE001 - whatever it is
        sent = remote.encode_exception(error, None, 1)
        with_locals = remote.encode_exception(error, shown_locals, 1)
        entries = error.__traceback__ and error.__traceback__.tb_next
        try:
            shown = "".join(traceback.format_exception(type(error), error, entries))
        except RuntimeError:  # raised by one of the exceptions
            shown = ""
        return {"sent": sent, "with_locals": with_locals, "shown": shown[:100_000]}
    raise AssertionError(job)


def strange_record() -> bytes:
    """Give a record with an attribute whose class the test's process does not have."""
    strange = type("Strange", (), {"__module__": "__main__"})
    setattr(sys.modules["__main__"], "Strange", strange)  # noqa: B010 - it has no such attribute yet
    record = logging.LogRecord("shop", logging.INFO, __file__, 1, "hello %s", ("you",), None)
    record.strange = strange()
    return remote.encode_record(record)


def main() -> None:
    """Write the outcomes of all jobs, and a strange log record, to standard output."""
    outcomes = {job.__name__: outcome(job) for job in JOBS}
    sys.stdout.buffer.write(pickle.dumps((outcomes, strange_record())))
