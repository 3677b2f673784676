"""Recipe: how far the work is, on the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from django.http import HttpRequest, StreamingHttpResponse

from leasepool_django import pools
from leasepool_django.worker import report_progress


def simulate_stock(days: int) -> float:
    """Report, a hundred times in all, how many days are done."""
    level = 0.5
    for day in range(days):
        if day % max(1, days // 100) == 0:
            report_progress({"done": day, "of": days})
        level = 3.9 * level * (1 - level)
    return level


async def events(days: int) -> AsyncIterator[str]:
    """Server-sent events: what is reported, then the result."""
    queue: asyncio.Queue[object] = asyncio.Queue()
    call = pools["reports"].options(on_progress=queue.put_nowait)
    task = asyncio.create_task(call.run(simulate_stock, days))
    task.add_done_callback(queue.put_nowait)  # with the task itself, as the last of all
    try:
        while (report := await queue.get()) is not task:
            yield f"event: progress\ndata: {json.dumps(report)}\n\n"
        yield f"event: result\ndata: {json.dumps(await task)}\n\n"
    finally:
        task.cancel()  # which stops the call, if the client has left


async def simulation(request: HttpRequest, days: int) -> StreamingHttpResponse:
    return StreamingHttpResponse(events(days), content_type="text/event-stream")
