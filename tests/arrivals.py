"""What arrives of the exceptions that a worker's process raised, and how tests look at it."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from leasepool_django.backends.process import remote
from leasepool_django.exceptions import RemoteError
from tests import exception_kinds as kinds

ROOT = Path(__file__).parents[1]


def run_worker(program: str) -> bytes:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, kinds.IN_WORKER: "1"},
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    ).stdout


@functools.cache
def from_worker() -> tuple[dict[str, dict[str, Any]], bytes]:
    """Every job's outcome, and a log record, as one process sent them, job after job."""
    outcomes, record = pickle.loads(run_worker("import tests.exception_jobs as jobs; jobs.main()"))
    return outcomes, record


def arrived(job: Any, form: str = "sent") -> Exception:
    return remote.decode_exception(from_worker()[0][job.__name__][form])


def arrived_as_remote_error(job: Any) -> RemoteError:
    error = arrived(job)
    assert type(error) is RemoteError
    return error


def entries(error: BaseException) -> list[TracebackType]:
    found = []
    entry = error.__traceback__
    while entry is not None:
        found.append(entry)
        entry = entry.tb_next
    return found


def names(error: BaseException) -> list[str]:
    return [entry.tb_frame.f_code.co_name for entry in entries(error)]
