"""A view that lets a worker do it."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse
from django.urls import path

from desk.accounts import invite
from leasepool_django import run_in_pool


async def invitation(request: HttpRequest, name: str) -> JsonResponse:
    """Invite somebody, and answer with the number of accounts."""
    return JsonResponse({"accounts": await run_in_pool(invite, name)})


urlpatterns = [path("invite/<name>", invitation)]
