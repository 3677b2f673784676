"""The test run's settings for workers that need more: caches to close, ``DEBUG``, a filter."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403

DEBUG = os.environ.get("WORKER_DEBUG") == "1"
CACHES = {
    "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "closing": {"BACKEND": "tests.worker_jobs.ClosingCache"},
    "missing": {"BACKEND": "tests.no_such_module.Cache"},
}
