"""Work that goes on after the response."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from leasepool_django import pools
from shop.scoring import score_order

logger = logging.getLogger(__name__)

# The event loop itself keeps only weak references to its tasks.
tasks: set[asyncio.Task[None]] = set()


def write_scores(destination: Path, stocks: list[int]) -> None:
    """Write a file of scores. It is either there as a whole or not at all."""
    logger.info("scores of %s articles begin", len(stocks))
    scores = {stock: score_order(stock, stock) for stock in stocks}
    unfinished = destination.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(scores))
    unfinished.replace(destination)


async def write_scores_in_a_worker(destination: Path, stocks: list[int]) -> None:
    try:
        await pools["background"].run(write_scores, destination, stocks)
    except Exception:
        logger.exception("%s was not written", destination.name)


@require_POST
async def update_scores(request: HttpRequest) -> JsonResponse:
    """Answer at once; the work goes on."""
    destination = Path(settings.MEDIA_ROOT) / "scores.json"
    stocks = [int(stock) for stock in request.POST.getlist("stock")]
    task = asyncio.create_task(write_scores_in_a_worker(destination, stocks))
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return JsonResponse({"status": "started"}, status=202)
