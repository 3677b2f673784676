"""Plain functions that return a coroutine, known as coroutine functions.

``manager.run`` and its like are such functions: with a frame of their own, error reports would show
the arguments of calls. ``async_to_sync`` and others ask before they call.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["coroutine_function"]

F = TypeVar("F", bound=Callable[..., Any])


def coroutine_function(function: F) -> F:
    """Mark ``function``, for ``inspect``, ``asyncio`` and ``asgiref``."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    mark = getattr(asyncio.coroutines, "_is_coroutine")  # noqa: B009 - asyncio 3.11 looks for it
    setattr(function, "_is_coroutine", mark)  # noqa: B010
    return function
