"""Settings of the test runs that ``tests.test_database`` starts; it says which databases there are.

The values it gives stand for what a project writes into its own settings.
"""

from __future__ import annotations

import json
import os
from typing import Any

import django

SECRET_KEY = "for tests only"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "leasepool_django",
]
DATABASES: dict[str, dict[str, Any]] = json.loads(os.environ["LEASEPOOL_TESTS_DATABASES"])
for database in DATABASES.values():
    # Tables without migrations, which take longer than all these tests.
    database.setdefault("TEST", {})["MIGRATE"] = False
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
USE_TZ = True
# A worker that sent its mail in earnest would fail.
NOWHERE = "192.0.2.1"
if django.VERSION >= (6, 1):
    SMTP = "django.core.mail.backends.smtp.EmailBackend"
    MAILERS = {"default": {"BACKEND": SMTP, "OPTIONS": {"host": NOWHERE, "timeout": 1}}}
else:
    EMAIL_HOST = NOWHERE
    EMAIL_TIMEOUT = 1
LEASEPOOL: dict[str, dict[str, Any]] = {"default": {"WORKERS_PER_POOL": 1}}
