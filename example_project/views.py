"""One view for each way to give CPU work to leased workers.

Read them from top to bottom: each shows one thing. The work itself is in ``cpu``.
"""

# ruff: noqa: ARG001 - Django gives every view the request, needed or not.

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from typing import NoReturn

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.http import content_disposition_header
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_http_methods

from example_project.cpu import (
    count_primes,
    digest_and_compress,
    score_order,
    slow_count,
    timed,
    worker_facts,
)
from example_project.forms import LimitForm, LimitsForm, UploadForm, ZoneForm
from leasepool_django import (
    NotPicklableError,
    pools,
    run_in_pool,
    run_in_pool_sync,
    with_lease,
)
from leasepool_django.engine import ExecutorLease

SLOW_SECONDS = 30.0
FULL_SECONDS = 3.0
BUSY_SECONDS = 3.0
TOO_DEEP = "The body's lists and objects are nested too deeply."


@require_GET
async def home(request: HttpRequest) -> HttpResponse:
    """List every page."""
    return render(request, "example/home.html")


@require_GET
async def primes(request: HttpRequest) -> HttpResponse:
    """Count primes in a worker: one call, one line."""
    form = LimitForm(request.GET or None, initial={"limit": 500_000})
    context: dict[str, object] = {"form": form, "server_pid": os.getpid()}
    if form.is_valid():
        start = time.perf_counter()
        context["count"] = await run_in_pool(count_primes, form.cleaned_data["limit"])
        context["seconds"] = time.perf_counter() - start
    return render(request, "example/primes.html", context)


@require_GET
async def primes_many(request: HttpRequest) -> HttpResponse:
    """Count primes for several limits at once, all within one lease."""
    form = LimitsForm(request.GET or None, initial={"limits": "300000 310000 320000 330000"})
    context: dict[str, object] = {"form": form}
    if form.is_valid():
        limits: list[int] = form.cleaned_data["limits"]
        start = time.perf_counter()
        async with pools["reports"].lease(owner="primes for several limits") as lease:
            answers = await asyncio.gather(
                *(lease.run(timed, count_primes, limit) for limit in limits)
            )
            context["workers"] = lease.workers
        context["seconds"] = time.perf_counter() - start
        context["seconds_in_workers"] = sum(answer.seconds for answer in answers)
        context["rows"] = list(zip(limits, answers, strict=True))
    return render(request, "example/primes_many.html", context)


@require_GET
def primes_sync(request: HttpRequest) -> HttpResponse:
    """Do the same from an ordinary view; under WSGI too."""
    form = LimitForm(request.GET or None, initial={"limit": 500_000})
    context: dict[str, object] = {"form": form, "server_pid": os.getpid()}
    if form.is_valid():
        start = time.perf_counter()
        context["count"] = run_in_pool_sync(count_primes, form.cleaned_data["limit"])
        context["seconds"] = time.perf_counter() - start
    return render(request, "example/primes_sync.html", context)


@csrf_exempt  # It computes from what was sent and changes nothing, so there is nothing to forge.
@require_http_methods(["GET", "POST"])
async def score(request: HttpRequest) -> HttpResponse:
    """Score an order posted as JSON. An error of the function arrives here as itself."""
    if request.method == "GET":
        return render(request, "example/score.html")
    try:
        order = json.loads(request.body, parse_constant=_refuse_constant)
    except RecursionError:
        return _bad_request(TOO_DEEP)
    except ValueError as error:
        return _bad_request(f"The body is not JSON: {error}")
    if not isinstance(order, dict):
        return _bad_request("The body must be a JSON object.")
    try:
        return JsonResponse(await run_in_pool(score_order, order))
    except NotPicklableError:  # nothing else keeps JSON data from travelling to a worker
        return _bad_request(TOO_DEEP)
    except ValueError as error:
        return _bad_request(str(error))


def _refuse_constant(name: str) -> NoReturn:
    """Called for ``NaN`` and ``Infinity``, which Python's parser would take."""
    raise ValueError(f"{name} is no JSON number")


def _bad_request(message: str) -> JsonResponse:
    return JsonResponse({"error": message}, status=HTTPStatus.BAD_REQUEST)


@require_http_methods(["GET", "POST"])
async def compress(request: HttpRequest) -> HttpResponse:
    """Hash and compress an upload. Large bytes may travel to a worker and back."""
    form = UploadForm(request.POST or None, request.FILES or None)
    context: dict[str, object] = {"form": form}
    if form.is_valid():
        upload = form.cleaned_data["file"]
        compressed = await run_in_pool(digest_and_compress, upload.read())
        if "download" in request.POST:
            name = content_disposition_header(as_attachment=True, filename=f"{upload.name}.xz")
            return HttpResponse(
                compressed.data,
                content_type="application/x-xz",
                headers={"Content-Disposition": name or "attachment"},
            )
        context |= {"name": upload.name, "compressed": compressed}
    return render(request, "example/compress.html", context)


@dataclass
class SlowJob:
    """What the slow page shows of a job: the worker that runs it and how far it is."""

    pid: int
    state: str = "running"


# The latest jobs of this server process; the loop that serves requests is its only user.
slow_jobs: OrderedDict[uuid.UUID, SlowJob] = OrderedDict()


@require_GET
async def slow(request: HttpRequest) -> HttpResponse:
    """Show the page that starts a slow job, watches its worker, and goes away on request."""
    context = {"job": uuid.uuid4(), "seconds": SLOW_SECONDS}
    return render(request, "example/slow.html", context)


@require_GET
async def slow_run(request: HttpRequest, job: uuid.UUID) -> HttpResponse:
    """Keep a worker busy. When the client goes away Django cancels this view, and with it the call.

    A lease of one worker lets two calls run in the same process, the first of which says which
    one it is.
    """
    async with pools["default"].lease(owner=f"slow job {job}", workers=1) as lease:
        facts = await lease.run(worker_facts)
        watched = slow_jobs[job] = SlowJob(facts.pid)
        while len(slow_jobs) > 100:
            slow_jobs.popitem(last=False)
        try:
            count = await lease.run(slow_count, SLOW_SECONDS)
        except asyncio.CancelledError:
            watched.state = "cancelled"
            raise
        watched.state = "finished"
    return JsonResponse({"count": count, "pid": watched.pid})


@require_GET
async def slow_status(request: HttpRequest, job: uuid.UUID) -> HttpResponse:
    """Say which worker runs the job and whether that process still exists."""
    watched = slow_jobs.get(job)
    if watched is None:
        return JsonResponse({"state": "waiting for a worker"})
    return JsonResponse(
        {"state": watched.state, "pid": watched.pid, "alive": _process_exists(watched.pid)}
    )


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@require_GET
async def full(request: HttpRequest) -> HttpResponse:
    """Show the page that asks for the only worker of a pool twice at once."""
    return render(request, "example/full.html", {"seconds": FULL_SECONDS})


@require_GET
@with_lease(pool="tiny", timeout=0.5)
async def full_run(request: HttpRequest, lease: ExecutorLease) -> HttpResponse:
    """Work for a while; who finds no worker within half a second gets 503 and ``Retry-After``."""
    answer = await lease.run(timed, slow_count, FULL_SECONDS)
    return JsonResponse({"count": answer.result, "pid": answer.pid})


@require_GET
async def responsive(request: HttpRequest) -> HttpResponse:
    """Show the page that measures a light view while the cores are busy."""
    context = {"workers": _default_workers(), "seconds": BUSY_SECONDS}
    return render(request, "example/responsive.html", context)


def _default_workers() -> int:
    return pools["default"].workers_per_pool


@require_GET
async def light(request: HttpRequest) -> HttpResponse:
    """Answer at once: the view that must never have to wait."""
    return JsonResponse({"time": timezone.now()})


@require_GET
async def busy(request: HttpRequest) -> HttpResponse:
    """Keep all workers busy, the right way: the event loop goes on serving others."""
    calls = [run_in_pool(slow_count, BUSY_SECONDS) for _ in range(_default_workers())]
    return JsonResponse({"counts": await asyncio.gather(*calls)})


@require_GET
async def blocking(request: HttpRequest) -> HttpResponse:
    """Keep a core busy the wrong way, for comparison: nobody else is served meanwhile."""
    return JsonResponse({"count": slow_count(BUSY_SECONDS)})


@require_GET
async def worker(request: HttpRequest) -> HttpResponse:
    """Ask a worker about itself: the caller's language and time zone are active in it."""
    form = ZoneForm(request.GET or None)
    context: dict[str, object] = {"form": form, "server_pid": os.getpid()}
    if form.is_valid():
        with timezone.override(form.cleaned_data["zone"]):
            context["facts"] = await run_in_pool(worker_facts)
    return render(request, "example/worker.html", context)
