"""Workers on the machines of a Dask cluster."""

from __future__ import annotations

LEASEPOOL = {
    "default": {
        "BACKEND": "dask",
        "WORKERS_PER_POOL": 64,
        "OPTIONS": {"address": "tcp://scheduler:8786"},
    },
}
