"""README: the settings."""

from __future__ import annotations

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    # ... your own
    "leasepool_django",
]

# Optional. Without it there is one pool, "default", with one worker per usable core.
LEASEPOOL = {
    "default": {"ACQUIRE_TIMEOUT": 30, "CALL_TIMEOUT": 60},
    "reports": {"WORKERS_PER_POOL": 2, "LEASE_SECONDS": 120},
}

MIDDLEWARE = [
    # ... your own
    "leasepool_django.middleware.LeasePoolMiddleware",
]
