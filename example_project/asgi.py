"""The site for ASGI servers: ``uvicorn example_project.asgi:application``.

The wrapper starts the pools before the server takes its first request and stops them after its
last.
"""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

from leasepool_django.asgi import LeasePoolLifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")

application = LeasePoolLifespan(get_asgi_application())
