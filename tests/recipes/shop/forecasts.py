"""A report whose work ends when nobody waits for it any more."""

from __future__ import annotations

import logging
import random

from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_GET

from leasepool_django import run_in_pool

logger = logging.getLogger(__name__)


def write_forecast(months: int) -> str:
    """Simulate the demand of coming months; return a table in CSV form."""
    logger.info("forecast of %s months begins", months)
    chance = random.Random(months)
    lines = ["month,low,median,high"]
    for month in range(1, months + 1):
        demand = sorted(chance.gauss(100 + month, 5 * month) for _ in range(5_000))
        lines.append(f"{month},{demand[250]:.1f},{demand[2_500]:.1f},{demand[4_750]:.1f}")
    return "\n".join(lines) + "\n"


@require_GET
async def forecast(request: HttpRequest, months: int) -> HttpResponse:
    """Send the report. When the client goes away, this view is cancelled where it awaits."""
    table = await run_in_pool(write_forecast, months)
    return HttpResponse(table, content_type="text/csv")
