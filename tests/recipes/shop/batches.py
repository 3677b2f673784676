"""Many calls under one lease."""

from __future__ import annotations

import asyncio
import json

from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from leasepool_django import pools
from shop.scoring import score_order


@require_POST
async def score_batch(request: HttpRequest) -> JsonResponse:
    """Score a JSON list of orders; one that fails does not spoil the others."""
    orders = json.loads(request.body)
    async with pools["reports"].lease(owner=f"batch of {len(orders)} orders") as lease:
        outcomes = await asyncio.gather(
            *(lease.run(score_order, order["quantity"], order["stock"]) for order in orders),
            return_exceptions=True,
        )
    return JsonResponse({"scores": [as_json(outcome) for outcome in outcomes]})


def as_json(outcome: float | BaseException) -> float | dict[str, str]:
    """A score as it is, an error as its text."""
    return {"error": str(outcome)} if isinstance(outcome, BaseException) else outcome
