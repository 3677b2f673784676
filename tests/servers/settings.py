"""Settings of the project that real servers serve. Tests vary them through the environment."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

SECRET_KEY = "for tests only"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.servers.urls"
ASGI_APPLICATION = "tests.servers.asgi.application"
WSGI_APPLICATION = "tests.servers.wsgi.application"
INSTALLED_APPS = ["leasepool_django"]
MIDDLEWARE = ["leasepool_django.middleware.LeasePoolMiddleware"]
DATABASES: dict[str, Any] = {}
USE_TZ = True
TIME_ZONE = "UTC"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{levelname} {name} [{process}] {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    "loggers": {"django": {"handlers": []}},
}

LEASEPOOL: dict[str, dict[str, Any]] = {
    "default": {
        "WORKERS_PER_POOL": 2,
        "SHUTDOWN_GRACE_SECONDS": float(os.environ.get("SERVERS_GRACE", "10")),
        "OPTIONS": {
            "initializer": "tests.servers.jobs.begin",
            "initargs": [os.environ.get("SERVERS_BROKEN", "")],
        },
    }
}

# A module that a test touches to make the server reload.
if "SERVERS_TOUCHED" in os.environ:
    import_module(os.environ["SERVERS_TOUCHED"])
