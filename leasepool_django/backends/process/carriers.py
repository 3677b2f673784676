"""What of a caller's context goes along with its calls, besides language and time zone.

A carrier is named by the dotted path of a ``ContextVar``, or of an object with ``capture()``, run
in the caller's context and returning something picklable, and ``apply(value)``, run in the call's
context in the worker. Standard library only: workers import this module.
"""

from __future__ import annotations

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
    """Import a carrier; ``TypeError`` if what is there is none."""
    carrier = pkgutil.resolve_name(path)
    if isinstance(carrier, ContextVar):
        return carrier
    if callable(getattr(carrier, "capture", None)) and callable(getattr(carrier, "apply", None)):
        return carrier
    raise TypeError(
        f"context: {path!r} is neither a ContextVar nor an object with capture() and apply(), but "
        f"{type(carrier).__name__}."
    )
