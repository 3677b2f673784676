"""Backends as users write them, which refuse to be made in one way or another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leasepool_django.backends.inline import InlineBackend


class Moody(InlineBackend):
    """A backend of a user's own, which raises what it likes."""

    def __init__(self, *_: Any) -> None:
        raise RuntimeError("not today")


class Needy(InlineBackend):
    """A backend of a user's own, which takes any option, and needs one."""

    def __init__(self, _config: Any, options: Mapping[str, Any]) -> None:
        if "url" not in options:
            raise ValueError("url is missing")
        raise ValueError(f"retries: {options['retries']}")

    @classmethod
    def option_names(cls) -> None:  # type: ignore[override]
        """Any."""


class Listed(Needy):
    """The same, with a list of its options."""

    @classmethod
    def option_names(cls) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"url", "retries"})


class Silent(InlineBackend):
    """A backend of a user's own, which does not say why it refuses."""

    def __init__(self, *_: Any) -> None:
        raise ValueError
