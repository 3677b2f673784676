"""Settings of the example site. What concerns leased workers stands at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

BASE_DIR = Path(__file__).resolve().parent.parent

# Not a secret: this site holds no data and is meant for one's own machine.
SECRET_KEY = "example-project-key-for-local-use-only"
DEBUG = os.environ.get("DEBUG", "1") != "0"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "leasepool_django",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    # A view that finds no worker in time answers 503 with Retry-After.
    "leasepool_django.middleware.LeasePoolMiddleware",
]

ROOT_URLCONF = "example_project.urls"
ASGI_APPLICATION = "example_project.asgi.application"
WSGI_APPLICATION = "example_project.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "example_project" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
            ],
        },
    },
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "db.sqlite3",
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

LANGUAGE_CODE = "en"
LANGUAGES = [("en", "English"), ("de", "Deutsch")]
USE_I18N = True
USE_TZ = True
TIME_ZONE = "UTC"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{levelname} {name} [{process}] {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    # Django gives this logger a handler of its own, which would print everything twice.
    "loggers": {"django": {"handlers": []}},
}

# More workers than cores, all aliases together: the pages of this site use one pool at a time.
SILENCED_SYSTEM_CHECKS = ["leasepool.W001"]

LEASEPOOL: dict[str, dict[str, Any]] = {
    # One pool with one worker per usable core, for calls that answer a request.
    "default": {
        "ACQUIRE_TIMEOUT": 30,
        # Workers start with the CPU code already imported.
        "OPTIONS": {"preload": ["example_project.cpu"]},
    },
    # For work that leases several workers at once. With a pool of its own it never has to wait
    # behind a stream of single calls, nor they behind it.
    "reports": {
        "WORKERS_PER_POOL": 2,
        "LEASE_SECONDS": 60,
        "OPTIONS": {"preload": ["example_project.cpu"]},
    },
    # One worker only, to show what happens when a pool is full.
    "tiny": {
        "WORKERS_PER_POOL": 1,
        "ACQUIRE_TIMEOUT": 0.5,
        "LEASE_SECONDS": 30,
    },
}
