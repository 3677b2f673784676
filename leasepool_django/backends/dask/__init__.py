"""The ``dask`` backend: workers on the machines of a Dask cluster (https://distributed.dask.org).

``backend`` is the engine's side, ``cluster`` what is said to the cluster and on which thread, and
``host`` what is done in Dask's worker processes, which import that module and no other.

A worker is a *seat* in one of these processes, and a call is a message there, by ``Client.run``:
never a task of Dask's, which it would run again when a machine is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...exceptions import UnsupportedBackendError

if TYPE_CHECKING:
    from .backend import DaskBackend

__all__ = ["DaskBackend"]


def __getattr__(name: str) -> Any:
    """Import the backend when it is asked for: Dask's worker processes do not need it."""
    if name != "DaskBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import distributed  # noqa: F401 - whether it is there
    except ImportError as error:
        raise UnsupportedBackendError(
            "It needs the package 'distributed': pip install 'leasepool-django[dask]'."
        ) from error
    from .backend import DaskBackend

    return DaskBackend
