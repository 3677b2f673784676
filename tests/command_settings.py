"""Settings for ``manage.py`` in the tests of the command: workers that leave a trace."""

from __future__ import annotations

import multiprocessing

from tests.settings import *  # noqa: F403

_NOTED = {"initializer": "tests.command_jobs.note_start"}

# More workers than this machine has cores, perhaps; the tests do not keep them busy for long.
SILENCED_SYSTEM_CHECKS = ["leasepool.W001"]

LEASEPOOL = {
    "default": {"WORKERS_PER_POOL": 2, "OPTIONS": _NOTED},
    "three": {"WORKERS_PER_POOL": 3, "OPTIONS": _NOTED},
    "threads": {"BACKEND": "thread", "WORKERS_PER_POOL": 2},
    "stdlib": {
        "BACKEND": "concurrent.futures.ProcessPoolExecutor",
        "WORKERS_PER_POOL": 1,
        "OPTIONS": {"mp_context": multiprocessing.get_context("spawn")},
    },
    "uneven": {
        "WORKERS_PER_POOL": 2,
        "OPTIONS": {"initializer": "tests.command_jobs.start_one_after_the_other"},
    },
    "broken": {
        "WORKERS_PER_POOL": 1,
        "OPTIONS": {"initializer": "tests.command_jobs.refuse_to_start"},
    },
}
