"""Settings of the shop, in which the recipes are at home."""

from __future__ import annotations

import os
from typing import Any

SECRET_KEY = "for recipes only"
ALLOWED_HOSTS = ["127.0.0.1", "testserver"]
ROOT_URLCONF = "shop.urls"
ASGI_APPLICATION = "shop.asgi.application"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "leasepool_django",
]
USE_TZ = True
MEDIA_ROOT = os.environ.get("SHOP_MEDIA_ROOT", "")
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

MIDDLEWARE = [
    "shop.request_ids.request_id_middleware",
    "leasepool_django.middleware.LeasePoolMiddleware",
]

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": "shop.request_ids.RequestIdFilter"}},
    "formatters": {"line": {"format": "{levelname} [{request_id}] {message}", "style": "{"}},
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "filters": ["request_id"],
            "formatter": "line",
        }
    },
    "root": {"handlers": ["console"], "level": "INFO"},
}

LEASEPOOL: dict[str, dict[str, Any]] = {
    "default": {
        "WORKERS_PER_POOL": 2,
        "CALL_TIMEOUT": 60,
        "CONTEXT": [
            "shop.request_ids.request_id",
            "leasepool_django.tracing.trace_context",
        ],
        "OPTIONS": {
            "initializer": "shop.tracing.start_tracing",
            "preload": ["shop.scoring"],
        },
    }
}

LEASEPOOL["reports"] = {
    "WORKERS_PER_POOL": 2,
    "LEASE_SECONDS": 60,
}

LEASEPOOL["background"] = {
    "WORKERS_PER_POOL": 1,
    "ACQUIRE_TIMEOUT": None,
    "MAX_WAITING": 100,
    "SHUTDOWN_GRACE_SECONDS": 20,
    "OPTIONS": {"nice": 19},
}

LEASEPOOL["limited"] = {
    "WORKERS_PER_POOL": 1,
    "OPTIONS": {
        "initializer": "shop.memory.limit_memory",
        "initargs": [256 * 1024 * 1024],
    },
}
