"""The two pages that are asked for."""

from __future__ import annotations

from django.urls import path

from . import views

urlpatterns = [path("cpu/<int:microseconds>", views.cpu), path("light", views.light)]
