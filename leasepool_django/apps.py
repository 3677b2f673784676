"""The Django application: it registers the system checks, and nothing else.

It must never start a pool: workers run ``AppConfig.ready`` as well. Nor import what they have no
use for: the checks come with the engine.
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks


class LeasePoolConfig(AppConfig):
    """Leased worker processes for CPU-heavy Python."""

    name = "leasepool_django"
    verbose_name = "Lease pools"

    def ready(self) -> None:
        """Register the system checks."""
        checks.register(_check_settings, "leasepool")
        checks.register(_check_deployment, "leasepool", deploy=True)


def _check_settings(**options: Any) -> list[checks.CheckMessage]:
    from .checks import check_settings

    return check_settings(**options)


def _check_deployment(**options: Any) -> list[checks.CheckMessage]:
    from .checks import check_deployment

    return check_deployment(**options)
