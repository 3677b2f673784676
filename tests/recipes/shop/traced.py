"""A view whose trace goes on in the worker."""

from __future__ import annotations

import logging

from django.http import HttpRequest, JsonResponse
from opentelemetry import trace

from leasepool_django import run_in_pool
from shop.request_ids import request_id
from shop.scoring import score_order

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


def traced_score(quantity: int, stock: int) -> dict[str, object]:
    with tracer.start_as_current_span("score") as span:
        logger.info("scoring for request %s", request_id.get())
        score = score_order(quantity, stock)
        return {"score": score, "trace": f"{span.get_span_context().trace_id:032x}"}


async def traced_view(request: HttpRequest) -> JsonResponse:
    with tracer.start_as_current_span("request"):
        return JsonResponse(await run_in_pool(traced_score, 8, 10))
