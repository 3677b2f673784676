"""What a worker tells of local variables: under ``DEBUG``, bounded, and as Django filters them."""

from __future__ import annotations

import logging
from collections import deque
from copy import copy
from functools import cache
from itertools import islice
from types import FrameType
from typing import Any

from django.conf import settings

__all__ = ["LONGEST_REPR", "frame_locals"]

logger = logging.getLogger("leasepool_django.worker")

LONGEST_REPR = 4096  # characters of one variable
MOST_SHOWN = 100  # variables of a frame, members of a container
BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    deque: ("deque([", "])"),
}


def frame_locals(frame: FrameType) -> dict[str, str]:
    """Return the variables of ``frame`` as bounded representations, under ``DEBUG`` only.

    What ``@sensitive_variables`` and the project's reporter filter hide is hidden here, before it
    leaves the worker. Never raises.
    """
    try:
        # Frames of this package hold the arguments once more, with no filter on their names.
        module: str = frame.f_globals.get("__name__", "")
        if not settings.DEBUG or module.startswith("leasepool_django."):
            return {}
        variables = _reporter_filter().get_traceback_frame_variables(None, frame)
        return {name: _BoundedRepr().of(value) for name, value in islice(variables, MOST_SHOWN)}
    except Exception:
        logger.warning("The variables of a frame could not be shown", exc_info=True)
        return {}


@cache
def _reporter_filter() -> Any:
    """The project's reporter filter, active.

    Django's own is idle under ``DEBUG``. Here it must not be: what it lets pass leaves the
    process, and may end up in logs and error trackers.
    """
    from django.views.debug import get_exception_reporter_filter

    own = copy(get_exception_reporter_filter(None))
    vars(own)["is_active"] = lambda _: True
    return own


class _BoundedRepr:
    """A ``repr`` that is cheap and short whatever the value; one object for one value."""

    def __init__(self) -> None:
        self._values_left = 1000

    def of(self, value: Any, depth: int = 6) -> str:
        """Return at most about ``LONGEST_REPR`` characters."""
        self._values_left -= 1
        if self._values_left < 0:
            return "…"
        try:
            text = self._of(value, depth)
        except BaseException as error:  # noqa: BLE001 - a __repr__ may raise anything
            return f"<{type(value).__name__} object; its repr raised {type(error).__name__}>"
        return text if len(text) <= LONGEST_REPR else f"{text[:LONGEST_REPR]}…"

    def _of(self, value: Any, depth: int) -> str:
        kind = type(value)
        if kind in BRACKETS:
            return self._members(value, depth, *BRACKETS[kind])
        if isinstance(value, (str, bytes, bytearray)) and len(value) > LONGEST_REPR:
            return f"{value[:LONGEST_REPR]!r}"
        if kind is int and value.bit_length() > 8192:
            # Its decimal digits take quadratic time, and Python refuses to write them.
            return f"<int of {value.bit_length()} bits>"
        return repr(value)

    def _members(self, value: Any, depth: int, opening: str, closing: str) -> str:
        if not value:
            return repr(value)
        if not depth:
            return f"{opening}…{closing}"
        if isinstance(value, dict):
            shown = [
                f"{self.of(key, depth - 1)}: {self.of(member, depth - 1)}"
                for key, member in islice(value.items(), MOST_SHOWN)
            ]
        else:
            shown = [self.of(member, depth - 1) for member in islice(value, MOST_SHOWN)]
        if len(value) > MOST_SHOWN:
            shown.append("…")
        elif opening == "(" and len(value) == 1:
            shown.append("")
        return f"{opening}{', '.join(shown).rstrip(' ')}{closing}"
