"""Functions that the tests of the ``leasepool`` command call in real workers.

Those that meet the test do so in the directory named by ``LEASEPOOL_TESTS_MEETING``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from leasepool_django.worker import in_worker

MEETING = "LEASEPOOL_TESTS_MEETING"
STARTED = "started-"
RUNNING = "running-"

NOT_A_FUNCTION = 3
NEITHER_A_FUNCTION: OrderedDict[str, int] = OrderedDict()


@dataclass(frozen=True)
class Point:
    x: int
    y: int


def meeting() -> Path:
    return Path(os.environ[MEETING])


def note_start() -> None:
    """The pool's initializer: leaves a file for each worker that was started."""
    (meeting() / f"{STARTED}{os.getpid()}").touch()


def start_one_after_the_other() -> None:
    """An initializer: the first worker is ready at once, each further one a second later."""
    try:
        (meeting() / "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(1)


def refuse_to_start() -> None:
    raise OSError("the licence server is down")


def double(value: Any) -> Any:
    return value * 2


def describe(*args: Any, **kwargs: Any) -> str:
    return f"{args} {kwargs}"


def nothing() -> str:
    return "called without arguments"


def fail_on_odd(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def leave_on_odd(number: int) -> int:
    """Leaves by ``SystemExit``, which cannot arrive as itself."""
    if number % 2:
        sys.exit(f"{number} is odd")
    return number


def die_on_odd(number: int) -> int:
    if number % 2:
        os._exit(9)
    return number


def hang_on_odd(number: int) -> int:
    if number % 2:
        burn()
    return number


def burn(*_args: Any) -> None:
    """Says that it runs, then keeps a core busy for ever."""
    (meeting() / f"{RUNNING}{os.getpid()}").touch()
    while True:
        pass


def wait_for_file(name: str) -> str:
    """Returns once the file exists, or after a minute."""
    deadline = time.monotonic() + 60
    while not (meeting() / name).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return name


def read_all(_value: object) -> str:
    """What a process that was started here finds on its standard input."""
    return subprocess.run(["cat"], capture_output=True, text=True, timeout=20, check=True).stdout


def touch_file(name: str) -> str:
    (meeting() / name).touch()
    return name


def not_json() -> bytes:
    return b"\xff"


def twins() -> dict[Any, str]:
    return {1: "a number", "1": "a text"}


def fail_in_red() -> NoReturn:
    raise ValueError("\x1b[31mred\x00\rand\tover\ntwo lines")


def fail_without_a_word() -> NoReturn:
    raise LookupError


def not_a_number() -> float:
    return float("nan")


def point() -> Point:
    return Point(1, 2)


def lock() -> Any:
    import threading

    return threading.Lock()


def say(text: str) -> int:
    print(text)  # noqa: T201 - what this function is for
    return len(text)


async def coroutine_function() -> None:
    pass


def describe_in_order(role: str) -> str:
    """``"wait"`` returns after ``"open"`` has returned."""
    return wait_for_file("opened") if role == "wait" else touch_file("opened")


def meet(name: str) -> str:
    """Called with ``"a"`` and ``"b"``, each returns only while the other is there."""
    touch_file(f"here-{name}")
    return wait_for_file("here-b" if name == "a" else "here-a")


def burn_outside_workers() -> None:
    """Returns at once in a worker, and never in any other process."""
    if not in_worker():
        burn()


def with_a_lock(value: int) -> dict[str, object]:
    """Return what cannot leave the worker."""
    return {"value": value, "parts": [threading.Lock()]}


def numbers(limit: int) -> Iterator[int]:
    """Be a generator function, whose result cannot leave the worker either."""
    yield from range(limit)


class Unshowable:
    """Has no representation."""

    def __repr__(self) -> str:
        raise LookupError("nothing to show")


def unshowable() -> Unshowable:
    return Unshowable()


class MuteError(Exception):
    """Cannot say what it is about."""

    def __str__(self) -> str:
        raise LookupError("nothing to say")


def fail_mutely() -> NoReturn:
    raise MuteError


def leave(status: int) -> NoReturn:
    sys.exit(status)


def interrupt_itself() -> NoReturn:
    raise KeyboardInterrupt


def leave_outside_workers() -> None:
    """Ends by ``SystemExit``, with the status of success, where it runs in no worker."""
    if not in_worker():
        sys.exit(0)


def wait_outside_workers(name: str) -> None:
    """Returns at once in a worker; says elsewhere that it runs, and waits for the file."""
    if not in_worker():
        (meeting() / f"{RUNNING}{os.getpid()}").touch()
        wait_for_file(name)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def filled(size: int) -> bytearray:
    return bytearray(b"x") * size


def view(size: int) -> memoryview:
    return memoryview(filled(size))


class WorkersOnly:
    """Can be pickled, and made again in workers only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return make_in_worker, ()


def make_in_worker() -> WorkersOnly:
    if not in_worker():
        raise LookupError("there is none here")
    return WorkersOnly()
