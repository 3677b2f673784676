"""A bare Django project: two applications with models, one middleware, no database.

``LEASEPOOL`` is left out unless a measurement asks for another shape than the default.
"""

from __future__ import annotations

import os
from typing import Any

SECRET_KEY = "for-measuring-only"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
# BENCH_PLAIN: to weigh what this package adds, it is added afterwards.
if "BENCH_PLAIN" not in os.environ:
    INSTALLED_APPS += ["leasepool_django"]
# Gives responses their length.
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
ROOT_URLCONF = "benchmarks.site.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

_default: dict[str, Any] = {}
if "BENCH_WORKERS" in os.environ:
    _default["MAX_POOLS"] = int(os.environ.get("BENCH_POOLS", "1"))
    _default["WORKERS_PER_POOL"] = int(os.environ["BENCH_WORKERS"])
_options: dict[str, Any] = {}
if os.environ.get("BENCH_PRELOAD"):
    _options["preload"] = [os.environ["BENCH_PRELOAD"]]
if "BENCH_NICE" in os.environ:
    _options["nice"] = int(os.environ["BENCH_NICE"])
if _options:
    _default["OPTIONS"] = _options
if _default:
    LEASEPOOL: dict[str, dict[str, Any]] = {"default": _default}
