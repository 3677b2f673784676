"""Texts about objects whose own code cannot be relied on: none of these functions raises.

Standard library only: every worker imports this module.
"""

# The code of foreign objects runs here and may raise anything, which must not get further:
# ruff: noqa: BLE001
from __future__ import annotations

import reprlib
import traceback
from types import TracebackType

__all__ = [
    "MAX_TEXT_CHARS",
    "MAX_TRACEBACK_CHARS",
    "bounded",
    "repr_of",
    "text_of",
    "traceback_text",
    "type_name",
]

MAX_TEXT_CHARS = 10_000
MAX_REPR_CHARS = 500
MAX_TRACEBACK_CHARS = 100_000


def type_name(value: object) -> str:
    """Give the dotted name of the type of ``value``; without a module for built-in types."""
    cls = type(value)
    # Through type itself: a metaclass or the class body may define both names as anything.
    module = type.__dict__["__module__"].__get__(cls)
    name = str.__str__(type.__dict__["__qualname__"].__get__(cls))
    return name if module == "builtins" or not isinstance(module, str) else f"{module}.{name}"


def text_of(value: object, limit: int = MAX_TEXT_CHARS) -> str:
    """Give ``str(value)``, cut to ``limit`` characters."""
    try:
        return bounded(str.__str__(str(value)), limit)
    except BaseException as error:
        return f"<its str() raised {type_name(error)}>"


def repr_of(value: object) -> str:
    """Give a representation of ``value`` of at most 500 characters."""
    try:
        return str.__str__(_repr.repr(value))[:MAX_REPR_CHARS]
    except BaseException as error:
        return f"<{type_name(value)} whose repr() raised {type_name(error)}>"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_REPR_CHARS


def bounded(text: str, limit: int) -> str:
    """Give ``text``, cut to ``limit`` characters and followed by the number of those cut off."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def traceback_text(
    exc: BaseException, entries: TracebackType | None, max_frames: int | None = None
) -> str:
    """Format ``exc`` and all chained to it as the interpreter does.

    Of each exception only the last ``max_frames`` frames, the ones next to the error, are shown.
    """
    try:
        limit = None if max_frames is None else -max_frames
        lines = traceback.format_exception(type(exc), exc, entries, limit=limit)
        return bounded("".join(lines), MAX_TRACEBACK_CHARS)
    except BaseException as error:
        return f"<formatting the traceback of {type_name(exc)} raised {type_name(error)}>\n"
