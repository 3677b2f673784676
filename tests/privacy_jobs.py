"""Functions that get secrets and fail, and ones that start processes of their own."""

from __future__ import annotations

import multiprocessing
from typing import Any

from django.http import HttpRequest
from django.views.decorators.debug import sensitive_variables


@sensitive_variables()
def fails_with(secret: str) -> None:
    """Fail while holding a secret."""
    raise ValueError(len(secret))


@sensitive_variables("secret")
def fails_beside(secret: str) -> None:
    """Fail while holding a secret, and a variable that is none."""
    note = f"{len(secret)} characters"
    raise ValueError(note)


def square(value: int) -> int:
    """Be a pool's work."""
    return value * value


def squares_by_a_pool(count: int) -> list[int]:
    """Use a pool of multiprocessing, which terminates its processes in the end."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(square, range(count))


def method_of(request: HttpRequest) -> str | None:
    """Take what cannot be sent."""
    return request.method


class RefusesToArrive:
    """Can be pickled, and cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, ("no number",))


def take(value: object) -> str:
    """Take anything."""
    return type(value).__name__
