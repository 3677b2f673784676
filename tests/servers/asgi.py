"""The project for ASGI servers."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

from leasepool_django.asgi import LeasePoolLifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.servers.settings")

application = LeasePoolLifespan(get_asgi_application())
