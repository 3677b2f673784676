"""What a function may use inside a worker. Light to import: the standard library only."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["in_inline_call", "in_worker"]


class _State:
    in_worker = False


_state = _State()


def in_worker() -> bool:
    """Whether this process is a worker, or the fork server that makes workers."""
    return _state.in_worker


def mark_worker() -> None:
    """Called once, first thing, in the fork server and in every worker."""
    _state.in_worker = True


_inline_call: ContextVar[bool] = ContextVar("leasepool_inline_call", default=False)


def in_inline_call() -> bool:
    """Whether the caller is part of a call that the ``inline`` backend runs in this process."""
    return _inline_call.get()


def enter_inline_call() -> None:
    """Called in the context of such a call, before its function."""
    _inline_call.set(True)
