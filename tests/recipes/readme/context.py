"""README: what follows a call."""

from __future__ import annotations

LEASEPOOL = {
    "default": {
        "CONTEXT": [
            "shop.request_ids.request_id",  # a ContextVar of your own
            "leasepool_django.tracing.trace_context",  # OpenTelemetry
        ],
    },
}
