"""Django settings of the test run: a small project with users, sessions and two languages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

SECRET_KEY = "for tests only"
DEBUG = False
ALLOWED_HOSTS = ["testserver", "127.0.0.1", "localhost"]
ROOT_URLCONF = "tests.urls"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "leasepool_django",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]

# A file of this run's own: the workers, which import this module too, find the same one through
# the environment, and two runs at a time do not meet. The test database is that very file, as a
# worker knows nothing of Django's renaming.
DATABASE_FILE = os.environ.setdefault(
    "LEASEPOOL_TESTS_DATABASE",
    str(Path(tempfile.gettempdir()) / f"leasepool-tests-{os.getpid()}.sqlite3"),
)
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DATABASE_FILE,
        "TEST": {"NAME": DATABASE_FILE},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
# Fast, and these users do not exist.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

USE_I18N = True
LANGUAGE_CODE = "en"
LANGUAGES = [("en", "English"), ("de", "Deutsch")]
USE_TZ = True
TIME_ZONE = "UTC"

LEASEPOOL: dict[str, dict[str, Any]] = {
    "default": {"MAX_POOLS": 1, "WORKERS_PER_POOL": 2},
    "reports": {"MAX_POOLS": 1, "WORKERS_PER_POOL": 2},
}
