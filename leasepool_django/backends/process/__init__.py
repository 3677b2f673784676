"""The ``process`` backend: worker processes that can be stopped one by one.

``pool`` is the parent's side of a worker's life and ``driver`` of its calls; ``control`` talks to
the ``forkserver``, which makes workers; ``worker`` is what they do. ``wire`` frames both sockets,
``preparation`` is what a worker is told, ``system`` what the platform offers. ``pickling``
(functions and arguments), ``remote`` (exceptions) and ``records`` (log records) cross the border.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ProcessBackend"]


def __getattr__(name: str) -> Any:
    # Lazily: workers import this package too, and need nothing of the parent's side.
    if name == "ProcessBackend":
        from .pool import ProcessBackend

        return ProcessBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
