"""The test project's URLs: none; a test that serves views names a module of its own."""

from __future__ import annotations

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
