"""``manager.options(…)``: one-shot calls with settings apart from the function's own keywords."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .calls import checked_owner
from .config import optional_duration
from .coroutines import coroutine_function
from .progress import OnProgress, checked_listener

if TYPE_CHECKING:
    from .calls import Calls

__all__ = ["CallOptions"]

P = ParamSpec("P")
T = TypeVar("T")


class CallOptions:
    """One-shot calls with settings of their own; see ``LeasedExecutorManager.options``."""

    def __init__(
        self,
        calls: Callable[[], Calls],
        timeout: float | None,
        call_timeout: float | None,
        owner: str | None,
        on_progress: OnProgress | None,
    ) -> None:
        # Asked for at each call: after a fork the manager has new ones.
        self._calls = calls
        self._timeout = optional_duration("timeout", timeout)
        self._call_timeout = optional_duration("call_timeout", call_timeout)
        self._owner = checked_owner(owner)
        self._on_progress = checked_listener(on_progress)

    @coroutine_function
    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[None, None, T]:
        """As ``LeasedExecutorManager.run``."""
        calls = self._calls()
        timeout, call_timeout = self._limits(calls)
        return calls.run(
            None, fn, args, kwargs, timeout, call_timeout, self._owner, self._on_progress
        )

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As ``LeasedExecutorManager.run_sync``."""
        try:
            run = self.prepare_sync(fn, *args, **kwargs)
        finally:
            del args, kwargs
        return run()

    def prepare_sync(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """As ``LeasedExecutorManager.prepare_sync``."""
        calls = self._calls()
        timeout, call_timeout = self._limits(calls)
        try:
            call = calls.new_call(
                None, fn, args, kwargs, call_timeout, self._owner, self._on_progress
            )
        finally:
            del args, kwargs
        return partial(calls.run_sync, None, call, timeout)

    def _limits(self, calls: Calls) -> tuple[float | None, float | None]:
        """Seconds to wait, and seconds the call may run."""
        timeout, call_timeout = self._timeout, self._call_timeout
        return (
            calls.acquire_timeout if timeout is None else timeout,
            calls.call_timeout if call_timeout is None else call_timeout,
        )
