"""Functions that tests of the Django side run in workers, or name in settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from leasepool_django import offload

NOT_CALLABLE = 3


def double(number: int) -> int:
    return number * 2


def describe(number: int, *, unit: str = "m") -> str:
    return f"{number} {unit}"


def fail(text: str) -> None:
    raise ValueError(text)


def load() -> int:
    return 0


def refuse_to_start(reason: str = "no licence found") -> None:
    raise ImproperlyConfigured(reason)


@offload
def triple(number: int) -> int:
    """Three times as much."""
    return number * 3


@offload(pool="reports", timeout=2.0, owner="quadruple")
def quadruple(number: int, *, plus: int = 0) -> int:
    return number * 4 + plus


@offload
def shown(self: str) -> str:
    return self


class Gate:
    """Lets a test hold functions that run in threads of its own process."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def pass_through(self) -> str:
        self.entered.release()
        if not self.open.wait(30):
            raise TimeoutError("nobody opened the gate")
        return "passed"


gates: dict[str, Gate] = {}


def through_gate(name: str) -> str:
    return gates[name].pass_through()


def sleep_then(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    time.sleep(seconds)
    return function(*args)


def through_time() -> None:
    """Works for much longer than any test waits."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        pass
