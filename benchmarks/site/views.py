"""A view that computes in a worker, and one that only answers."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from .. import jobs


async def cpu(request: HttpRequest, microseconds: int) -> HttpResponse:  # noqa: ARG001
    """Use the CPU for ``microseconds`` in a worker of the contender that serves."""
    # Here, so that the site can be loaded where no contender serves.
    from . import serving

    await serving.run(jobs.spin, microseconds / 1e6)
    return HttpResponse(b"done")


async def light(request: HttpRequest) -> HttpResponse:  # noqa: ARG001
    """Answer at once."""
    return HttpResponse(b"light")
