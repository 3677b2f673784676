"""Carries the OpenTelemetry trace context into workers.

With ``"CONTEXT": ["leasepool_django.tracing.trace_context"]`` in an alias of
``settings.LEASEPOOL``, spans that a function starts in a worker are children of the span that was
current where the call was made. Needs the package ``opentelemetry-api``; the propagators are those
the project has configured (by default W3C ``traceparent`` and baggage).
"""

from __future__ import annotations

from opentelemetry import context, propagate

__all__ = ["trace_context"]


class _TraceContext:
    """See the module."""

    def capture(self) -> dict[str, str]:
        """Note the current span's context, as headers."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier

    def apply(self, carrier: dict[str, str]) -> None:
        """Make it current; the call's own ``contextvars.Context`` ends it with the call."""
        context.attach(propagate.extract(carrier))


trace_context = _TraceContext()
