"""Raises in the middle of a step of the account, as a signal handler may at any line."""

from __future__ import annotations

import gc
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from leasepool_django.backends.process import driver
from leasepool_django.engine import ahead, dispatcher, lease, line

__all__ = ["Interrupter", "Interruption"]


class Interruption(Exception):  # noqa: N818
    """Raised by a signal handler, at any point."""


class Interrupter:
    """Raises at the ``step``-th line of the account or the driver below ``root``.

    While that is called the first two times. Of outcomes, those are of the first two calls; the
    third may have been sent ahead by then.
    """

    FILES = frozenset(module.__file__ for module in (ahead, dispatcher, lease, line, driver))

    def __init__(self, root: Callable[..., Any], step: int) -> None:
        self.left = step
        self.where = ""
        self._root = root.__code__
        self._called = 0
        self._depth = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        before = sys.gettrace()
        gc.disable()  # what finalizers raise goes nowhere
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before)
            gc.enable()

    def _entered(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is self._root:
            self._called += 1
            self._depth = 1
        elif self._depth and frame.f_code.co_filename in self.FILES:
            self._depth += 1
        else:
            return None
        return self._within

    def _within(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "return":
            self._depth -= 1
        elif event == "line" and self._called <= 2 and not self._leaves_block(frame):
            self.left -= 1
            if not self.left:
                file = Path(frame.f_code.co_filename).name
                self.where = f"{file}: {frame.f_code.co_name}:{frame.f_lineno}"
                raise Interruption
        return self._within

    @staticmethod
    def _leaves_block(frame: FrameType) -> bool:
        """Where a ``with`` statement is left, as a signal never interrupts: the lock is held."""
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()[:5] == "with "
