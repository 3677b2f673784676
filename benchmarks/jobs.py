"""What runs in the workers: functions at module level, which every contender can send by name.

Light to import, so that no contender pays for what its call does not need.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

__all__ = [
    "announce_and_spin",
    "array_sum",
    "as_coroutine",
    "chunk",
    "django_answer",
    "django_worker",
    "echo",
    "hold",
    "set_up_django",
    "spin",
    "stored_array",
    "tiny",
]


def tiny(value: int) -> int:
    """Return ``value``: a call that costs nothing but its way there and back."""
    return value


def echo(data: Any) -> Any:
    """Return ``data`` as it came."""
    return data


def spin(seconds: float) -> None:
    """Use ``seconds`` of this thread's CPU time.

    CPU time, not wall-clock time: what a contender's own processes take from the cores must show.
    """
    deadline = time.thread_time() + seconds
    while time.thread_time() < deadline:
        pass


def chunk(rounds: int) -> int:
    """Do a fixed amount of work in plain Python."""
    total = 0
    for number in range(rounds):
        total += number * number % 7
    return total


def array_sum(array: Any) -> float:
    """Add up a NumPy array."""
    return float(array.sum())


@functools.cache
def stored_array(size: int) -> Any:
    """Return an array of ``size`` bytes that this process keeps: a call only has to send it."""
    import numpy as np

    return np.ones(size // 8)


def announce_and_spin(begun: str, seconds: float) -> None:
    """Write one byte into the FIFO ``begun``, then keep a core busy for ``seconds``."""
    _announce(begun)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass


def hold(begun: str, free: str) -> None:
    """Write one byte into the FIFO ``begun``, then wait for one in the FIFO ``free``."""
    _announce(begun)
    fd = os.open(free, os.O_RDONLY)
    try:
        os.read(fd, 1)
    finally:
        os.close(fd)


def _announce(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b".")
    finally:
        os.close(fd)


def set_up_django() -> None:
    """Set Django up in this process, unless it is."""
    import django
    from django.apps import apps

    if not apps.ready:
        django.setup()


def django_answer() -> str:
    """Answer from a worker in which models can be used, set up now if nothing did it before."""
    set_up_django()
    from django.contrib.auth.models import User

    return str(User._meta.label)


def django_worker() -> int:
    """The same, answering with the process that answered."""
    django_answer()
    return os.getpid()


async def as_coroutine(fn: Callable[..., Any], *args: Any) -> Any:
    """Call a plain function, for contenders that take coroutine functions only."""
    return fn(*args)
