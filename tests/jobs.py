"""Work for workers of every backend: found by name in any process, and fit to run in a thread.

A function that takes a ``folder`` tells the test there what it does; see ``tests.stage``.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# A function that waits for a test gives up after so many seconds.
PATIENCE = 30.0

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


# --- well-behaved ---------------------------------------------------------------------------------


def add(left: int, right: int = 0) -> int:
    return left + right


def keywords(**named: Any) -> dict[str, Any]:
    return named


def whoami() -> tuple[int, int]:
    """The process and the thread that run this."""
    return os.getpid(), threading.get_ident()


def current_request() -> str:
    return request_id.get()


def append_to(items: list[str], item: str) -> list[str]:
    items.append(item)
    return items


def log(text: str) -> str:
    logging.getLogger("tests.jobs").warning(text)
    return text


def make_lock() -> Any:
    """A result that no pickle can hold."""
    return threading.Lock()


def pause(seconds: float, value: Any = None) -> Any:
    """Be slow."""
    time.sleep(seconds)
    return value


# --- seen and directed by the test ----------------------------------------------------------------


def begin(folder: Path, name: str) -> str:
    """Add ``name`` to those that have begun, in the order in which they did."""
    with (folder / "begun").open("a") as file:
        file.write(f"{name}\n")
    return name


def hold(folder: Path, name: str) -> str:
    """Begin, and return once the test lets ``name`` go."""
    begin(folder, name)
    wait_for(folder, name)
    return name


def hold_and_fail(folder: Path, name: str) -> NoReturn:
    hold(folder, name)
    raise ValueError(name)


def hold_worker(folder: Path, name: str) -> int:
    """Begin, leave the worker's pid in the file ``name``, and wait as ``hold`` does."""
    unfinished = folder / f".{name}"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(folder / name)
    hold(folder, name)
    return os.getpid()


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "go").exists() or (folder / f"go-{name}").exists()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} was never let go")
        time.sleep(0.002)


def need(path: Path) -> None:
    """An initializer that fails as long as ``path`` is missing."""
    if not path.exists():
        raise OSError(f"{path.name} is missing")


# --- failing --------------------------------------------------------------------------------------


class ShopError(Exception):
    """With facts that the constructor does not get back from ``args``."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def fail(message: str) -> NoReturn:
    raise ValueError(message)


def fail_with_code(message: str, code: int) -> NoReturn:
    raise ShopError(message, code=code)


def raise_stop_iteration() -> NoReturn:
    raise StopIteration("no more")


def raise_stop_async_iteration() -> NoReturn:
    raise StopAsyncIteration("no more")


def raise_system_exit() -> NoReturn:
    raise SystemExit("no more")


def raise_keyboard_interrupt() -> NoReturn:
    raise KeyboardInterrupt("no more")


def raise_cancelled() -> NoReturn:
    raise asyncio.CancelledError("no more")


def raise_generator_exit() -> NoReturn:
    raise GeneratorExit("no more")


def die(status: int = 7) -> NoReturn:
    os._exit(status)


def be_killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


# --- refused before they are sent -----------------------------------------------------------------


async def coroutine_function(value: int = 0) -> int:
    return value


class AsyncCallable:
    async def __call__(self) -> None:
        pass


def nested() -> Callable[[], int]:
    def inner() -> int:
        return 1

    return inner
