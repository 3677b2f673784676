"""What of a caller's context goes along with its calls, besides language and time zone.

A carrier is named by the dotted path of a ``ContextVar``, or of an object with ``capture()``, run
in the caller's context and returning something picklable, and ``apply(value)``, run in the call's
context in the worker. Standard library only: workers import this module.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

__all__ = ["Carriers"]


class Carriers:
    """The carriers of one manager, in order; the same on both sides."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._carriers = [_resolve(path) for path in paths]

    def capture(self) -> list[tuple[int, Any]]:
        """Note the caller's values; a variable that is not set stays unset in the worker."""
        values = []
        for index, carrier in enumerate(self._carriers):
            if isinstance(carrier, ContextVar):
                value = carrier.get(_UNSET)
                if value is not _UNSET:
                    values.append((index, value))
            else:
                values.append((index, carrier.capture()))
        return values

    def apply(self, values: Sequence[tuple[int, Any]]) -> None:
        """Set the caller's values, in the present context."""
        for index, value in values:
            carrier = self._carriers[index]
            if isinstance(carrier, ContextVar):
                carrier.set(value)
            else:
                carrier.apply(value)


_UNSET = object()


def _resolve(path: str) -> Any:
    """Import a carrier; ``ValueError`` if that fails, ``TypeError`` if what is there is none."""
    try:
        carrier = pkgutil.resolve_name(path)
    except Exception as error:  # the module is the user's, and may raise anything
        raise ValueError(
            f"context names {path!r}, which cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if isinstance(carrier, ContextVar):
        return carrier
    reason = _why_not(carrier, "capture") or _why_not(carrier, "apply", None)
    if reason:
        raise TypeError(
            f"context names {path!r}, which is neither a ContextVar nor an object with capture() "
            f"and apply(value): {reason}."
        )
    return carrier


def _why_not(carrier: Any, name: str, *arguments: Any) -> str | None:
    """Why a method cannot be called with ``arguments``; ``None`` if it can, or does not tell."""
    method = getattr(carrier, name, None)
    if not callable(method):
        return f"it is of type {type(carrier).__name__}, without {name}()"
    if inspect.iscoroutinefunction(method):
        return f"its {name}() is a coroutine function"
    try:
        signature = inspect.signature(method)
    except ValueError:
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        hint = "; name an object of the class" if isinstance(carrier, type) else ""
        return f"its {name}() cannot be called like that: {error}{hint}"
    return None
