"""Addresses of the project that real servers serve."""

from __future__ import annotations

from django.urls import path

from . import views

urlpatterns = [
    path("alive", views.alive),
    path("line", views.line),
    path("once/async", views.once_async),
    path("once/sync", views.once_sync),
    path("lease/async", views.lease_async),
    path("lease/sync", views.lease_sync),
    path("spin", views.spin),
    path("slow/async", views.slow_async),
    path("slow/sync", views.slow_sync),
]
