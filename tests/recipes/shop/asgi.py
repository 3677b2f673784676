"""The shop for ASGI servers: HTTP and WebSockets."""

from __future__ import annotations

import os

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

from leasepool_django.asgi import LeasePoolLifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
http = get_asgi_application()

from shop.consumers import ScoreConsumer  # noqa: E402 - Django must be set up before
from shop.tracing import start_tracing  # noqa: E402

start_tracing()
websocket = ScoreConsumer.as_asgi()  # with several consumers, a URLRouter
application = LeasePoolLifespan(ProtocolTypeRouter({"http": http, "websocket": websocket}))
