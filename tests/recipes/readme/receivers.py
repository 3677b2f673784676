"""README: a receiver of signals."""

from __future__ import annotations

import logging
from typing import Any

from django.dispatch import receiver

from leasepool_django.engine import Event
from leasepool_django.signals import lease_expired, worker_crashed

logger = logging.getLogger(__name__)


@receiver([worker_crashed, lease_expired])
def report_trouble(*, alias: str, event: Event, **kwargs: Any) -> None:
    logger.error("%s: %s %s", alias, event.text, event.facts)
