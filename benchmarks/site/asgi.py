"""The project for uvicorn, with the contender that the environment names."""

from __future__ import annotations

from django.core.asgi import get_asgi_application

from benchmarks.contenders import InDjango
from benchmarks.jobs import set_up_django
from benchmarks.site.serving import contender, with_contender
from leasepool_django.asgi import LeasePoolLifespan

set_up_django()
_django = get_asgi_application()
application = (
    LeasePoolLifespan(_django) if isinstance(contender, InDjango) else with_contender(_django)
)
