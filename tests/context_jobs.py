"""Context variables, a carrier, and functions that show what a worker sees of them."""

from __future__ import annotations

import logging
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id")
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Doubling:
    """A carrier whose value is made on one side and used on the other."""

    def capture(self) -> int:
        """Note something of the caller."""
        return len(request_id.get("")) * 2

    def apply(self, value: int) -> None:
        """Use it in the worker."""
        tenant.set(f"tenant {value}")


doubling = Doubling()
not_a_carrier = object()


def seen() -> tuple[str, str]:
    """Return both variables as this process has them."""
    return request_id.get("unset"), tenant.get()


def log_something() -> None:
    """Write a log record."""
    logging.getLogger("tests.context").warning("from the worker")


def span_parent() -> tuple[int, int]:
    """Return the trace id and span id that a new span would have as its parent."""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return context.trace_id, context.span_id
