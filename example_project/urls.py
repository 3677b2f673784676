"""Every page of the example site."""

from __future__ import annotations

from django.urls import include, path

from example_project import views

urlpatterns = [
    path("", views.home, name="home"),
    path("primes/", views.primes, name="primes"),
    path("primes/many/", views.primes_many, name="primes-many"),
    path("primes/sync/", views.primes_sync, name="primes-sync"),
    path("score/", views.score, name="score"),
    path("compress/", views.compress, name="compress"),
    path("slow/", views.slow, name="slow"),
    path("slow/run/<uuid:job>/", views.slow_run, name="slow-run"),
    path("slow/status/<uuid:job>/", views.slow_status, name="slow-status"),
    path("full/", views.full, name="full"),
    path("full/run/", views.full_run, name="full-run"),
    path("responsive/", views.responsive, name="responsive"),
    path("responsive/busy/", views.busy, name="busy"),
    path("responsive/blocking/", views.blocking, name="blocking"),
    path("light/", views.light, name="light"),
    path("worker/", views.worker, name="worker"),
    path("i18n/", include("django.conf.urls.i18n")),
]
