"""Finds what it is in a call's arguments, or in its result, that cannot be pickled.

``pickle`` says which type it stumbled over, not where that was. The search goes from the arguments
downwards, always into a part that cannot be pickled by itself either, and so ends at the culprit
with the way to it in hand: ``kwargs['client'].pool``. Its time of computing is bounded, so that a
process that is stopped for a while, or waits for a core, finds as much as any other; and all of its
time, where a caller's thread waits for it. When that is up the way is as long as it got. Texts name
positions, attributes, keys that are identifiers, and types; never a value.
"""

# The code of foreign objects runs here and may raise anything, which must not get further:
# ruff: noqa: BLE001
from __future__ import annotations

import copyreg
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any, NamedTuple

from leasepool_django.exceptions import NotPicklableError

from .hints import hint_for
from .shared import reduce_view
from .texts import type_name

__all__ = ["Part", "blame", "by_key"]

SEARCH_SECONDS = 0.25
SEARCH_SECONDS_IN_ALL = 2.0
MAX_DEPTH = 50
MAX_ITEMS = 1_000_000
MAX_KEY_CHARS = 40
_OBJECTS_BETWEEN_LOOKS = 256


class Part(NamedTuple):
    """Something that is sent, or is inside of it, and how the way to it is written."""

    path: str
    value: Any


class _Culprit(NamedTuple):
    trail: list[Part]
    """The way to the culprit, which comes last."""
    error: BaseException
    exact: bool
    """Whether nothing inside it is to blame; if false, time was up or the way too long."""


def blame(
    error: BaseException, sent: Sequence[Part], *, subject: str, patient: bool = False
) -> NotPicklableError:
    """Give the error to raise when ``sent`` could not be pickled because of ``error``.

    ``subject`` begins its text: "The arguments of shop.cpu.score cannot be sent to a worker".
    Computes for at most about ``SEARCH_SECONDS``, and if not ``patient`` takes at most
    ``SEARCH_SECONDS_IN_ALL``; unless pickling one of the objects takes longer.
    """
    if isinstance(error, MemoryError):
        result = NotPicklableError(
            f"{subject}: there is not enough memory to pickle them. Send less, or let the worker "
            "read it from where it is stored."
        )
        result.__cause__ = error
        return result
    search = _Search(math.inf if patient else SEARCH_SECONDS_IN_ALL)
    try:
        culprit = search.culprit(sent)
    except Exception:  # an object that resists; a RecursionError of a caller with little stack left
        culprit = search.furthest
    if culprit is None:
        result = NotPicklableError(f"{subject}: pickling raised {type_name(error)}.")
        result.__cause__ = error.with_traceback(None)
        return result
    path, value = culprit.trail[-1]
    its_type = type_name(value)
    if isinstance(culprit.error, RecursionError) and culprit.error.__traceback__ is None:
        path, value = culprit.trail[0]
        said = f"{path} is nested too deeply to be pickled. Send a flatter structure"
    else:
        said = f"{path}: {its_type}"
        hint = hint_for([part.value for part in culprit.trail], culprit.error)
        if not culprit.exact:
            said += " (or something inside it)"
        elif not hint and culprit.error.__traceback__ is not None:  # Python code of its own
            said += f", whose pickling raised {type_name(culprit.error)}"
        if hint:
            said += f". {hint}"
    result = NotPicklableError(f"{subject}: {said}.", path=path, type_name=type_name(value))
    result.__cause__ = culprit.error
    return result


class _OutOfTimeError(BaseException):
    """Ends the search. Not an ``Exception``, which a ``__reduce__`` might catch."""


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Probe(pickle.Pickler):
    """Pickles into nowhere, copying as little as possible, until time is up."""

    def __init__(self, is_up: Callable[[], bool]) -> None:
        super().__init__(_Nowhere(), 5, buffer_callback=lambda _: None)
        self._is_up = is_up
        self._until_look = 1

    def persistent_id(self, obj: object) -> None:  # noqa: ARG002 - called for every object
        self._until_look -= 1
        if not self._until_look:
            self._until_look = _OBJECTS_BETWEEN_LOOKS
            if self._is_up():
                raise _OutOfTimeError

    def reducer_override(self, obj: object) -> Any:
        # Calls and results are pickled by a pickler that lets these travel.
        return reduce_view(obj) if type(obj) is memoryview else NotImplemented


class _Parts(NamedTuple):
    """Parts whose ways are not written before they are asked for: there may be a million."""

    values: Sequence[Any]
    path: Callable[[int], str]


class _Search:
    def __init__(self, seconds: float) -> None:
        self._deadline = time.thread_time() + SEARCH_SECONDS
        self._end = time.perf_counter() + seconds
        self._entered: set[int] = set()
        self._kept: list[object] = []  # objects made for the search, so that no id is used twice
        self.furthest: _Culprit | None = None

    def culprit(self, sent: Sequence[Part]) -> _Culprit | None:
        parts = _Parts([part.value for part in sent], lambda i: sent[i].path)
        try:
            for part, error in self._failing(parts):
                if found := self._at([part], error):
                    return found
        except _OutOfTimeError:
            pass
        return self.furthest

    def _at(self, trail: list[Part], error: BaseException) -> _Culprit | None:
        """Give the culprit in the last part of ``trail``.

        ``None`` if that fails only for what it has in common with a part it is inside of.
        """
        if self.furthest is None or len(trail) > len(self.furthest.trail):
            self.furthest = _Culprit(trail, error, exact=False)
        if len(trail) >= MAX_DEPTH:
            return self.furthest
        part = trail[-1]
        self._entered.add(id(part.value))
        in_circles = False
        for parts in self._inside(part):
            for inner, inner_error in self._failing(parts):
                is_new = id(inner.value) not in self._entered
                if is_new and (found := self._at([*trail, inner], inner_error)):
                    return found
                in_circles = True
        return None if in_circles else _Culprit(trail, error, exact=True)

    def _failing(self, parts: _Parts) -> Iterator[tuple[Part, BaseException]]:
        """Give the parts that cannot be pickled by themselves, halving where there are many."""
        suspects = [i for i, value in enumerate(parts.values) if type(value) not in _SCALARS]
        ranges = [(0, len(suspects))] if suspects else []
        while ranges:
            start, stop = ranges.pop()
            values = [parts.values[i] for i in suspects[start:stop]]
            error = self._error(values if len(values) > 1 else values[0])
            if error is None:
                continue
            if len(values) == 1:
                yield Part(parts.path(suspects[start]), values[0]), error
            else:
                middle = (start + stop) // 2
                ranges += [(middle, stop), (start, middle)]

    def _error(self, value: object) -> BaseException | None:
        try:
            _Probe(self._is_up).dump(value)
        except (_OutOfTimeError, KeyboardInterrupt):
            raise
        except BaseException as error:
            # The entries of this module go; those of a __reduce__ written in Python remain.
            entry = error.__traceback__
            while entry is not None and entry.tb_frame.f_globals is globals():
                entry = entry.tb_next
            return error.with_traceback(entry)
        return None

    def _is_up(self) -> bool:
        return time.thread_time() > self._deadline or time.perf_counter() > self._end

    def _inside(self, part: Part) -> Iterator[_Parts]:
        path, value = part
        # By its type, as pickle does: what an object says of its class may run code of its own.
        kind = type(value)
        if issubclass(kind, _PICKLED_BY_NAME):
            return
        is_container = True
        if issubclass(kind, dict):
            yield from _pairs(path, dict.items(value))
        elif issubclass(kind, list | tuple | set | frozenset):
            yield _items(path, value)
        else:
            is_container = False
        if kind in _CONTAINERS:
            return
        reduced = _reduced(value)
        self._kept.append(reduced)
        if not reduced:
            return
        arguments, state, items, pairs = [*reduced[1:5], None, None, None, None][:4]
        names = self._names(path, value)
        yield from _state(path, state, names)
        # A class that fails here makes the object itself the culprit.
        passed = [argument for argument in arguments if not isinstance(argument, type)]
        yield _named(passed, names, f"{path}.__reduce_ex__(5)[1]")
        if items is not None and not is_container:
            yield _items(path, list(islice(items, MAX_ITEMS)))
        if pairs is not None and not is_container:
            yield from _pairs(path, islice(pairs, MAX_ITEMS))

    def _names(self, path: str, value: object) -> dict[int, str]:
        """Give the ways to the attributes of ``value``, by the attributes' identities."""
        found: dict[str, Any] = {}
        for cls in type(value).__mro__:
            for name, descriptor in vars(cls).items():
                if isinstance(descriptor, MemberDescriptorType | GetSetDescriptorType):
                    try:
                        found[name] = descriptor.__get__(value, cls)
                    except Exception:  # noqa: S112 - a slot without a value
                        continue
        found.pop("__weakref__", None)
        attributes = found.pop("__dict__", None)
        if isinstance(attributes, dict):
            found.update(attributes)
        self._kept.append(found)
        names = {id(attribute): f"{path}.{name}" for name, attribute in found.items()}
        if issubclass(type(value), BaseException):
            arguments = BaseException.__dict__["args"].__get__(value)
            names |= {id(a): f"{path}.args[{i}]" for i, a in enumerate(arguments)}
        return names


_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
_CONTAINERS = (dict, list, tuple, set, frozenset)
_PICKLED_BY_NAME = (type, FunctionType, BuiltinFunctionType, ModuleType)


def by_key(path: str, key: object, position: int) -> str:
    """Write the way to a value of a mapping; keys that are not names may be data."""
    if isinstance(key, str) and key.isidentifier() and len(key) <= MAX_KEY_CHARS:
        return f"{path}['{key}']"
    return f"{path}.values()[{position}]"


def _items(path: str, value: Any) -> _Parts:
    fields = getattr(value, "_fields", ()) if issubclass(type(value), tuple) else ()
    return _Parts(
        list(value), lambda i: f"{path}.{fields[i]}" if i < len(fields) else f"{path}[{i}]"
    )


def _pairs(path: str, pairs: Any) -> Iterator[_Parts]:
    listed = list(pairs)
    yield _Parts([v for _, v in listed], lambda i: by_key(path, listed[i][0], i))
    yield _Parts([key for key, _ in listed], lambda i: f"{path}.keys()[{i}]")


def _named(values: Sequence[Any], names: dict[int, str], otherwise: str) -> _Parts:
    return _Parts(values, lambda i: names.get(id(values[i]), f"{otherwise}[{i}]"))


def _state(path: str, state: object, names: dict[int, str]) -> Iterator[_Parts]:
    """Give the parts of what ``__getstate__`` gave; the default one gives the attributes."""
    if isinstance(state, dict):
        listed = list(state.items())
        yield _Parts(
            [v for _, v in listed],
            lambda i: (
                names.get(id(listed[i][1])) or by_key(f"{path}.__getstate__()", listed[i][0], i)
            ),
        )
    elif isinstance(state, tuple):
        for one in state:  # the default state of a class with slots is a pair of such dicts
            if isinstance(one, dict) and id(one) not in names:
                yield from _state(path, one, names)
        yield _named(state, names, f"{path}.__getstate__()")
    elif state is not None:
        yield _Parts([state], lambda _: names.get(id(state), f"{path}.__getstate__()"))


def _reduced(value: object) -> tuple[Any, ...]:
    """Give what pickle would save of ``value``; empty if that is only a name, or an error."""
    try:
        reducer = copyreg.dispatch_table.get(type(value))
        reduced = reducer(value) if reducer else value.__reduce_ex__(5)
    except (_OutOfTimeError, KeyboardInterrupt):
        raise
    except BaseException:  # the culprit is the object itself, and its error known already
        return ()
    return reduced if isinstance(reduced, tuple) else ()
