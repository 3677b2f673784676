"""Calls that are named in text: a function's dotted path and its arguments as JSON.

Used by the ``leasepool`` command, which refuses what could never run before any worker starts;
``run_call`` is what travels to the worker. Workers import this module, so it stays light.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, SupportsIndex

from ..backends.process.shared import dump
from ..backends.process.texts import bounded, text_of, traceback_text, type_name
from ..worker import in_worker

__all__ = [
    "Call",
    "Failure",
    "Outcome",
    "check_call",
    "find_function",
    "json_value",
    "parse_calls",
    "parse_kwargs",
    "run_call",
    "shown",
]

_MAX_QUOTED_CHARS = 100
# Python's JSON takes them for numbers, which JSON itself does not have.
_NO_NUMBERS = frozenset({"NaN", "Infinity", "-Infinity"})


@dataclass(frozen=True)
class Call:
    """One call of the function, as given on the command line."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def text(self, name: str) -> str:
        """The call as Python would write it: ``count_primes(20000)``."""
        parts = [shown(value) for value in self.args]
        parts += [f"{key}={shown(value)}" for key, value in self.kwargs.items()]
        return f"{name}({', '.join(parts)})"


@dataclass(frozen=True)
class Failure:
    """An exception that ended a call, as text."""

    type_name: str
    message: str
    traceback_text: str


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the process that ran it, seconds it took there, and what came of it.

    ``pid`` and ``seconds`` are ``None`` where the worker could not tell, because it was stopped or
    died. ``result`` means nothing when there is a ``failure``. ``function`` is its dotted path.

    Any outcome can be pickled: one whose result cannot be arrives as a failure.
    """

    function: str
    pid: int | None
    seconds: float | None
    result: Any = None
    failure: Failure | None = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle the result by itself, here where it is known which process could not."""
        parts: _Parts = (b"", [])
        failure = self.failure
        if failure is None:
            try:
                parts = _pickled(self.result, int(protocol))
            except BaseException as error:
                if _is_ctrl_c(error):
                    raise
                failure = _cannot_leave(error, self.result, self.function)
        return _received, (self.function, self.pid, self.seconds, parts, failure)


_Parts = tuple[bytes, list[pickle.PickleBuffer]]


def _pickled(value: Any, protocol: int) -> _Parts:
    if protocol < 5:  # multiprocessing's, up to Python 3.13
        return pickle.dumps(value, protocol), []
    payload = dump(value, pieces=True)
    return b"".join(payload.stream), [pickle.PickleBuffer(buffer) for buffer in payload.buffers]


def _received(
    function: str, pid: int, seconds: float, parts: Any, failure: Failure | None
) -> Outcome:
    stream, buffers = parts
    result = pickle.loads(stream, buffers=buffers) if failure is None else None
    return Outcome(function, pid, seconds, result, failure)


def _cannot_leave(error: BaseException, result: Any, function: str) -> Failure:
    from ..backends.process.pickling import explain_result

    told = explain_result(error, result, function)
    text = str(told)
    if told.path is not None and not isinstance(told.__cause__, RecursionError):
        text = f"the result cannot leave the worker: {told.path} is of type {told.type_name}"
    return Failure(type(told).__name__, text, "")


def shown(value: object) -> str:
    """Give ``repr(value)``, or why there is none: ``<int: cannot be shown: ValueError: …>``."""
    try:
        return repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - foreign code may raise anything
        return f"<{type_name(value)}: cannot be shown: {type_name(error)}: {text_of(error)}>"


def parse_calls(
    arguments: Sequence[str], lists: Sequence[str], kwargs_text: str | None
) -> list[Call]:
    """Return the calls that the command line asks for; one without arguments if it names none.

    Each of ``arguments`` is one call with one argument: JSON where it parses as JSON, otherwise
    the string itself. Each of ``lists`` is one call with the items of that JSON list. The JSON
    object ``kwargs_text`` gives keyword arguments to every call. Raises ``ValueError`` with a
    sentence for the user.
    """
    kwargs = parse_kwargs(kwargs_text)
    calls = [Call((_value(text),), kwargs) for text in arguments]
    for text in lists:
        items = _json_of_type(list, "--args", text, "a list such as '[1, \"two\"]'")
        calls.append(Call(tuple(items), kwargs))
    return calls or [Call((), kwargs)]


def _value(text: str) -> Any:
    if text in _NO_NUMBERS:
        return text
    try:
        return _json("ARG", text)
    except json.JSONDecodeError:
        return text


def json_value(origin: str, text: str) -> Any:
    """The value of JSON; ``ValueError`` with a sentence if it has none.

    ``origin``: where ``text`` comes from, with which the sentence begins.
    """
    try:
        return _json(origin, text)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"{origin} {_quoted(text)} is not JSON: {why}.") from error


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Read the JSON object with the keyword arguments for every call; ``ValueError`` if none."""
    if text is None:
        return {}
    wanted = "an object such as '{\"limit\": 10}'"
    kwargs: dict[str, Any] = _json_of_type(dict, "--kwargs", text, wanted)
    return kwargs


def _json_of_type(kind: type, option: str, text: str, wanted: str) -> Any:
    value = json_value(option, text)
    if not isinstance(value, kind):
        raise ValueError(f"{option} takes {wanted}, not {_quoted(text)}.")
    return value


def _json(origin: str, text: str) -> Any:
    """Read JSON; ``JSONDecodeError`` where it is none.

    ``ValueError`` with a sentence for the user where it is, but holds what cannot be passed on.
    """
    numbers = _Numbers()
    try:
        value = json.loads(
            text, parse_int=numbers.integer, parse_float=numbers.real, parse_constant=numbers.real
        )
    except RecursionError as error:
        raise ValueError(f"{origin} {_quoted(text)} is nested too deeply.") from error
    if numbers.trouble is not None:
        raise ValueError(f"{origin} {_quoted(text)} cannot be passed on: {numbers.trouble}.")
    return value


class _Numbers:
    """Makes the numbers of one JSON text. ``trouble``: what is wrong with one of them.

    Told afterwards: ``Infinity and beyond`` is no JSON, so its first word is not wrong.
    """

    trouble: str | None = None

    def integer(self, text: str) -> int:
        try:
            return int(text)
        except ValueError as error:  # more digits than Python converts
            self.trouble = str(error)
            return 0

    def real(self, text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            self.trouble = f"{bounded(text, _MAX_QUOTED_CHARS)} is not a finite number"
        return number


def _quoted(text: str) -> str:
    return bounded(repr(text), _MAX_QUOTED_CHARS)


def find_function(path: str) -> Callable[..., Any]:
    """Import what ``path`` names: ``package.module.function``, or an attribute deeper down.

    Raises ``ValueError`` with a sentence for the user when it cannot be imported or cannot run in
    a worker.
    """
    found = _import_path(path)
    if not callable(found):
        raise ValueError(f"{path!r} is {_a(type(found).__name__)}, not a function.")
    fn: Callable[..., Any] = found
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise ValueError(
            f"{path!r} is a coroutine function; a worker runs plain functions, so name one "
            "written with 'def'."
        )
    if inspect.isgeneratorfunction(fn):
        raise ValueError(
            f"{path!r} is a generator function, whose result cannot leave the worker; let it "
            "return a list."
        )
    return fn


def check_call(fn: Callable[..., Any], path: str, how: str, call: Call) -> None:
    """Raise ``ValueError`` with a sentence for the user if ``fn`` does not take what ``call`` has.

    ``how``: what that is, such as "without an ARG". A function that does not say what it takes
    passes.
    """
    try:
        # A decorator may supply what the function that it wraps asks for.
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ValueError(f"{path!r} cannot be called {how}: {error}.") from error


def _import_path(path: str) -> Any:
    names = path.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise ValueError(f"{path!r} is not a dotted path such as 'package.module.function'.")
    found: Any = _import_module(names[0], path)
    if found is None:
        raise ValueError(f"Cannot import {path!r}: there is no module {names[0]!r}.")
    for depth, name in enumerate(names[1:], start=1):
        owner = found
        try:
            found = getattr(owner, name)
            continue
        except AttributeError:
            found = None
        if isinstance(owner, ModuleType):
            found = _import_module(".".join(names[: depth + 1]), path)
        if found is None:
            where = ".".join(names[:depth])
            close = difflib.get_close_matches(name, dir(owner), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"Cannot import {path!r}: {where!r} has no {name!r}{hint}")
    return found


def _import_module(module: str, path: str) -> ModuleType | None:
    """The module, or ``None`` where there is no such module."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        cause: Exception = error
    except Exception as error:  # noqa: BLE001 - a module may raise anything while imported
        cause = error
    raise ValueError(
        f"Cannot import {path!r}: importing {module!r} raised {type(cause).__name__}: {cause}"
    ) from cause


def _a(noun: str) -> str:
    # Without the u, which most often sounds as in User and URL.
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def run_call(path: str, call: Call, *, prints_to_stderr: bool) -> Outcome:
    """Run one call in this process, normally a worker.

    Whatever the function raises, Ctrl-C in the main thread apart, is part of the outcome, with the
    traceback that starts in the function. With ``prints_to_stderr`` what the function prints in a
    worker goes to standard error.
    """
    # A worker runs one call at a time. Elsewhere the stream belongs to other threads as well.
    redirect = prints_to_stderr and in_worker()
    result, failure = None, None
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr) if redirect else contextlib.nullcontext():
        try:
            fn = find_function(path)
            start = time.perf_counter()
            result = fn(*call.args, **call.kwargs)
        except BaseException as error:
            if _is_ctrl_c(error):
                raise
            failure = _failure(error)
    return Outcome(path, os.getpid(), time.perf_counter() - start, result, failure)


def _failure(error: BaseException) -> Failure:
    inside = error.__traceback__.tb_next if error.__traceback__ else None
    return Failure(type_name(error), text_of(error), traceback_text(error, inside))


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether the user wants this process to end; Python tells the main thread, without words."""
    return (
        isinstance(error, KeyboardInterrupt)
        and not error.args
        and not in_worker()  # where the signal raises nothing
        and threading.current_thread() is threading.main_thread()
    )
