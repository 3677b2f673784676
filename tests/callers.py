"""Ways of asking a manager for work: from event loops of both kinds, bridges, and plain threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from asgiref.sync import async_to_sync

from leasepool_django import LeasedExecutorManager

__all__ = ["Ask", "LoopThread", "every_kind_of_caller"]

T = TypeVar("T")

Ask: TypeAlias = Callable[..., Future[Any]]
"""Takes a function and its arguments, and gives a future of its result at once."""


class LoopThread:
    """An event loop that runs on a thread of its own."""

    def __init__(self, new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """Stop the loop, and leave all that awaits on it in the air."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def close(self) -> None:
        """Stop the loop if it runs, and close it."""
        if self._thread.is_alive():
            self.stop()
        self.loop.close()


@contextmanager
def every_kind_of_caller(manager: LeasedExecutorManager) -> Iterator[dict[str, Ask]]:
    """Give ways of asking ``manager`` for one call, each from another loop or thread."""
    import uvloop

    loops = [LoopThread(asyncio.SelectorEventLoop), LoopThread(uvloop.new_event_loop)]

    def asyncio_run(fn: Callable[..., T], *args: Any) -> Future[T]:
        return threads.submit(lambda: asyncio.run(manager.run(fn, *args)))

    try:
        with ThreadPoolExecutor(32) as threads:
            yield {
                "asyncio": lambda fn, *args: loops[0].submit(manager.run(fn, *args)),
                "uvloop": lambda fn, *args: loops[1].submit(manager.run(fn, *args)),
                "blocking": lambda fn, *args: threads.submit(manager.run_sync, fn, *args),
                "asyncio.run": asyncio_run,
                "async_to_sync": lambda fn, *args: threads.submit(
                    async_to_sync(manager.run), fn, *args
                ),
            }
    finally:
        for loop in loops:
            loop.close()
