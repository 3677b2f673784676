"""README: how far a call is."""

from __future__ import annotations

from leasepool_django import pools
from leasepool_django.worker import report_progress


def render(pages: int) -> int:
    for page in range(pages):
        report_progress(page)  # does nothing where nobody listens
    return pages


async def rendered() -> int:
    call = pools["default"].options(on_progress=print)
    return await call.run(render, 3)
