"""No capacity, or a server that shuts down → ``503 Service Unavailable`` with ``Retry-After``.

``LeasePoolMiddleware`` does it for any view; ``with_lease`` for the lease it takes itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeGuard

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase

from .exceptions import LeasePoolNotStartedError, LeaseUnavailableError
from .handler import pools

__all__ = ["LeasePoolMiddleware", "is_no_capacity", "no_capacity_response"]

logger = logging.getLogger(__name__)

# What a view may get instead of a worker.
NoWorkerError = LeaseUnavailableError | LeasePoolNotStartedError

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>503 Service Unavailable</title></head>
<body><h1>The server is busy</h1><p>{detail}</p></body>
</html>
"""


def is_no_capacity(error: BaseException) -> TypeGuard[NoWorkerError]:
    """Whether it is worth while to ask again: workers are in use, or the server restarts."""
    if isinstance(error, LeaseUnavailableError):
        return not error.waits_for_itself
    # Without a shutdown, a manager that was not started is a mistake of the project.
    return isinstance(error, LeasePoolNotStartedError) and pools.closed


def no_capacity_response(request: HttpRequest | None, error: NoWorkerError) -> HttpResponse:
    """Return the 503 for ``error``: JSON where the request prefers it, a small page otherwise.

    ``Retry-After`` is the error's estimate of when a worker is free, in whole seconds, at least 1.
    The error's text stays inside, since it names aliases and owners: it is logged as a warning,
    with the request's path, and Django's own record of the response is left out.
    """
    seconds = retry_after_seconds(error)
    unit = "second" if seconds == 1 else "seconds"
    busy = isinstance(error, LeaseUnavailableError)
    reason = "All workers are in use." if busy else "The server is being restarted."
    detail = f"{reason} Please try again in {seconds} {unit}."
    response: HttpResponse
    if request is not None and _prefers_json(request):
        body = {"error": "no_capacity", "detail": detail, "retry_after": seconds}
        response = JsonResponse(body, status=503)
    else:
        response = HttpResponse(PAGE.format(detail=detail), status=503)
    response["Retry-After"] = str(seconds)
    response["Cache-Control"] = "no-store"
    _log(request, error)
    # private: Django's mark of a response that log_response() need not report. It reports any 503
    # as an error, which mails ADMINS once for every request refused, when there is most to do; no
    # public setting exempts a single response.
    setattr(response, "_has_been_logged", True)  # noqa: B010
    return response


def _log(request: HttpRequest | None, error: NoWorkerError) -> None:
    # Escaped as Django does it: a path may have line ends, which would forge records.
    path = "a request" if request is None else request.path.encode("unicode_escape").decode()
    text = str(error)  # a record that is kept must not keep the frames of a traceback
    facts = {"status_code": 503, "request": request}
    logger.warning("%s is answered 503 Service Unavailable: %s", path, text, extra=facts)


def retry_after_seconds(error: NoWorkerError) -> int:
    """Return the error's estimate in whole seconds, at least 1."""
    estimate = error.retry_after if isinstance(error, LeaseUnavailableError) else None
    if estimate is None or not math.isfinite(estimate):
        return 1
    return max(1, math.ceil(estimate))


def _prefers_json(request: HttpRequest) -> bool:
    return request.get_preferred_type(["text/html", "application/json"]) == "application/json"


class LeasePoolMiddleware:
    """Turns ``LeaseUnavailableError``, ``LeaseTimeoutError`` included, in a view into a 503.

    So it does with ``LeasePoolNotStartedError`` while the server shuts down. Works in sync and in
    async stacks. Errors that ``asyncio.TaskGroup`` has gathered count when all of them are of this
    kind.
    """

    sync_capable = True
    async_capable = True

    def __init__(
        self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]
    ) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Pass on; errors of views come to ``process_exception``."""
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Called by Django with what a view raised."""
        error = _longest_wait(exception)
        return None if error is None else no_capacity_response(request, error)


def _longest_wait(exception: BaseException) -> NoWorkerError | None:
    """Return the error that asks for the longest wait, ``None`` if ``exception`` is another."""
    if is_no_capacity(exception):
        return exception
    if isinstance(exception, BaseExceptionGroup):
        members = [_longest_wait(member) for member in exception.exceptions]
        errors = [member for member in members if member is not None]
        if len(errors) == len(members):
            return max(errors, key=retry_after_seconds)
    return None
