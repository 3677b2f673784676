"""Functions that show how the inline backend runs them."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from typing import Any, NoReturn

from leasepool_django import pools

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")
initialized: list[tuple[Any, ...]] = []
kept: list[Any] = []


class UnpicklableError(Exception):
    def __reduce__(self) -> NoReturn:
        raise TypeError("it has a lock inside")


def initialize(*arguments: object) -> None:
    initialized.append((os.getpid(), *arguments))


def keep(value: Any) -> Any:
    """Keep the argument, and give it back."""
    kept.append(value)
    return value


class Watched:
    """Something that can be referred to weakly."""


def watch(value: Watched, *, fails: bool = False) -> None:
    kept.append(weakref.ref(value))
    if fails:
        raise ValueError("watched")


def set_request_id(value: str) -> str:
    """The variable as it was; it is changed for the rest of the call."""
    before = request_id.get()
    request_id.set(value)
    return before


def fail_with_local(secret: str) -> NoReturn:
    local = secret.upper()
    raise ValueError(len(local))


def raise_unpicklable() -> NoReturn:
    raise UnpicklableError("no way out")


def press_ctrl_c() -> NoReturn:
    raise KeyboardInterrupt


def use_pools() -> str:
    return repr(pools["default"])


def run_a_loop() -> int:
    """What a function can do that is not called from a running event loop."""

    async def answer() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    return asyncio.run(answer())
