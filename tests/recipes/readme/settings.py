"""README: the settings."""

from __future__ import annotations

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    # ... your own
    "leasepool_django",
]

# Optional. Without it there is one pool, "default", with one worker per usable core. With 4 cores:
LEASEPOOL = {
    "default": {"WORKERS_PER_POOL": 3, "ACQUIRE_TIMEOUT": 30, "CALL_TIMEOUT": 60},
    "reports": {"WORKERS_PER_POOL": 1, "LEASE_SECONDS": 120},
}

MIDDLEWARE = [
    # ... your own
    "leasepool_django.middleware.LeasePoolMiddleware",
]
