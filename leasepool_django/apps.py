"""The Django application: it registers the system checks, and nothing else.

It must never start a pool: workers run ``AppConfig.ready`` as well.
"""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks


class LeasePoolConfig(AppConfig):
    """Leased worker processes for CPU-heavy Python."""

    name = "leasepool_django"
    verbose_name = "Lease pools"

    def ready(self) -> None:
        """Register the system checks."""
        from .checks import check_deployment, check_settings

        checks.register(check_settings, "leasepool")
        checks.register(check_deployment, "leasepool", deploy=True)
