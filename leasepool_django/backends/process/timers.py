"""Timers that a function leaves running: their signal would hit the call after it.

To cancel them after every call takes a system call, which makes a tiny one slower by a twentieth.
So ``signal.alarm`` and ``signal.setitimer`` are replaced, in workers and their fork server alone,
by callables that do the same and note that they were used. Standard library only: every worker
imports this module.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Timers", "use", "watch"]

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class _Use:
    """Whether a timer was set, or unset, since somebody has looked."""

    noted = False


use = _Use()


class _Noting:
    """Stands for a built-in function: like one, it makes no method of a class's attribute."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        use.noted = True
        return self._function(*args)


def watch() -> None:
    """Note from now on when timers are set. Before the user's modules are imported."""
    for name in ("alarm", "setitimer"):
        function = getattr(signal, name)
        if not isinstance(function, _Noting):
            noting = _Noting(function)
            setattr(signal, name, noting)
            setattr(sys.modules["_signal"], name, noting)  # where pickle finds it


class Timers:
    """What functions may set: all but those that run already, such as a profiler's."""

    def __init__(self) -> None:
        self._idle = [timer for timer in _TIMERS if not signal.getitimer(timer)[0]]
        use.noted = False

    def cancel(self) -> None:
        """Cancel what was set since."""
        for timer in self._idle:
            signal.setitimer(timer, 0)
        use.noted = False
