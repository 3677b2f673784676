"""README: one call, one worker."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse

from example_project.cpu import calculate_score
from leasepool_django import run_in_pool


async def score(request: HttpRequest) -> JsonResponse:
    result = await run_in_pool(calculate_score, payload={"value": 21.0})
    return JsonResponse({"score": result})
