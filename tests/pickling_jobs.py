"""What the tests of pickling send about: functions of every kind, and objects that are trouble."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# --- functions to be referenced ------------------------------------------------------------------


def plain(value: int = 0) -> int:
    return value + 1


async def coroutine() -> None:
    """Cannot run in a worker."""


async def async_generator() -> AsyncIterator[int]:
    yield 1


def generator() -> Iterator[int]:
    yield 1


square = lambda x: x * x  # noqa: E731 - a lambda at the top level of a module is refused as well


def nest() -> Callable[[], None]:
    def nested() -> None:
        """Cannot be found by a worker."""

    return nested


def with_wraps(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    return wrapper


def without_wraps(function: Callable[P, T]) -> Callable[P, T]:
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    return wrapper


@with_wraps
def decorated() -> str:
    return "decorated"


@with_wraps
@with_wraps
def decorated_twice() -> str:
    return "decorated twice"


@without_wraps
def badly_decorated() -> str:
    return "badly decorated"


@functools.lru_cache
def cached() -> str:
    return "cached"


def replaced() -> str:
    return "the first"


the_replaced = replaced


def replaced() -> str:  # type: ignore[no-redef]
    return "the second"


class Machine:
    """Has functions of every kind in it."""

    def method(self) -> str:
        return "method"

    @classmethod
    def of_class(cls) -> str:
        return "of class"

    @staticmethod
    def static() -> str:
        return "static"

    async def async_method(self) -> None:
        """Cannot run in a worker."""

    @classmethod
    async def async_of_class(cls) -> None:
        """Cannot run in a worker."""

    def steps(self) -> Iterator[int]:
        yield 1

    class Part:
        """A class in a class is found by name."""


class CallableObject:
    def __call__(self) -> str:
        return "called"


@dataclass
class Unhashable:
    """A callable that cannot be a key of a dict."""

    value: int = 1

    def __call__(self) -> int:
        return self.value


class AsyncCallable:
    async def __call__(self) -> None:
        """Cannot run in a worker."""


class GeneratorCallable:
    def __call__(self) -> Iterator[int]:
        yield 1


class Evasive:
    """Fails on every attribute that it does not have."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(name)

    def __call__(self) -> None:
        """Do nothing."""


# --- objects that cannot be sent -----------------------------------------------------------------


class Holder:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("empty", "held")

    def __init__(self, held: object) -> None:
        self.held = held


class Client:
    """Like clients of caches and queues: a pool of connections, and in it a lock."""

    def __init__(self) -> None:
        self.pool = Holder(lock=threading.Lock())


class Renaming:
    def __init__(self, lock: object) -> None:
        self._lock = lock

    def __getstate__(self) -> dict[str, object]:
        return {"fresh": self._lock, "not a name": 1}


class TupleState:
    """Its state, like that of functools.partial, is a tuple of other things than attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TupleState, (), (threading.Lock(), 2)


class ObjectState:
    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectState, (), threading.Lock()


class ReducesToPairs:
    def __setitem__(self, key: str, value: object) -> None:
        """Take what the pickle brings."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ReducesToPairs, (), None, None, iter([("a", threading.Lock())])


class InterruptsTheSecondTime:
    times = 0

    def __reduce__(self) -> NoReturn:
        self.times += 1
        raise TypeError("no") if self.times == 1 else KeyboardInterrupt


class RaisesInReduce:
    def __reduce__(self) -> NoReturn:
        raise ValueError("reduced")


class ExitsInReduce:
    def __reduce__(self) -> NoReturn:
        sys.exit("reduced")


class RecursesInGetstate:
    def __getstate__(self) -> object:
        return self.__getstate__()


class Homeless:
    __module__: str = None  # type: ignore[assignment]  # as made by type() in some libraries

    def __reduce__(self) -> NoReturn:
        raise ValueError("no")


class Resists:
    """Whatever it is asked, it raises."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise ValueError(name)
