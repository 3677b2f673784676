"""What the system checks of this package report for a value of ``settings.LEASEPOOL``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage, run_checks

from leasepool_django.conf import ProblemId

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

__all__ = ["found", "only"]


def found(settings: Settings, value: Any, *, deploy: bool = False) -> list[CheckMessage]:
    settings.LEASEPOOL = value
    return [
        message
        for message in run_checks(include_deployment_checks=deploy)
        if str(message.id).startswith("leasepool.")
    ]


def only(settings: Settings, value: Any, expected: ProblemId, *, deploy: bool = False) -> str:
    """Return message and hint of the one finding, whose id must be ``expected``."""
    messages = found(settings, value, deploy=deploy)
    assert [message.id for message in messages] == [expected.value]
    [message] = messages
    assert message.hint
    assert message.is_serious() is (".E" in expected.value)
    return f"{message.msg} | {message.hint}"
