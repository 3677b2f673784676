"""Exceptions that travel well, and exceptions of every kind that do not."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

IN_WORKER = "LEASEPOOL_TESTS_IN_WORKER"

# --- exceptions that travel ----------------------------------------------------------------------


class ComposesItsMessage(Exception):  # noqa: N818
    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")
        self.code = code


@dataclass(frozen=True)
class Frozen(Exception):  # noqa: N818
    code: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (self.code,)


class Unchangeable(Exception):  # noqa: N818
    """Nothing can be set on it, its traceback and its notes included."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError(f"{name} cannot be set")


class RaisesOnArrival:
    """An argument whose unpickling raises an exception that forbids changes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return raise_unchangeable, ()


def raise_unchangeable() -> NoReturn:
    raise Unchangeable("on arrival")


class ReducesWithoutArgs(Exception):  # noqa: N818
    """Its args cannot be pickled, and its __reduce__ does without them."""

    def __init__(self, note: str, lock: object = None) -> None:
        super().__init__(note, lock)
        self.note = note

    def __reduce__(self) -> tuple[Any, ...]:
        return ReducesWithoutArgs, (self.note,)


class OwnGroup(ExceptionGroup[Exception]):
    """A group with a class of its own."""


# --- exceptions that do not ----------------------------------------------------------------------


class OwnBase(BaseException):
    """Passes by every ``except Exception``."""


class AlsoCancelled(asyncio.CancelledError, ValueError):  # noqa: N818
    """An Exception that an event loop takes for a cancellation."""


class NeedsArguments(Exception):  # noqa: N818
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


class HoldsLock(Exception):  # noqa: N818
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class ReduceRaises(Exception):  # noqa: N818
    def __reduce__(self) -> NoReturn:
        raise ValueError("no")


class ReduceExits(Exception):  # noqa: N818
    def __reduce__(self) -> NoReturn:
        sys.exit(3)


class RebuildExits(Exception):  # noqa: N818
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (3,)


class RebuildsAsText(Exception):  # noqa: N818
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("no exception",)


class RebuildsAsExit(Exception):  # noqa: N818
    def __reduce__(self) -> tuple[Any, ...]:
        return SystemExit, (3,)


class RebuiltInWorkerOnly(Exception):  # noqa: N818
    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_in_worker, (self.args,)


def rebuild_in_worker(args: tuple[Any, ...]) -> RebuiltInWorkerOnly:
    if IN_WORKER not in os.environ:
        sys.exit("not here")
    return RebuiltInWorkerOnly(*args)


class RebuiltAsExitInParent(Exception):  # noqa: N818
    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_as_exit_in_parent, ()


def rebuild_as_exit_in_parent() -> BaseException:
    return RebuiltAsExitInParent() if IN_WORKER in os.environ else SystemExit(3)


class Unprintable(Exception):  # noqa: N818
    def __str__(self) -> NoReturn:
        raise RuntimeError("no text")


class UnprintableAndUnpicklable(Unprintable):
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no pickle")


class HostileNotes(list[str]):
    def __getitem__(self, index: Any) -> NoReturn:
        raise RuntimeError("no notes")


class UnreadableNotes(list[str]):
    def __iter__(self) -> NoReturn:
        raise RuntimeError("no notes")
