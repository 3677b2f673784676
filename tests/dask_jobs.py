"""Functions that tests run on a cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from leasepool_django.worker import in_worker
from tests.process_jobs import announce
from tests.waiting import wait_until


def surroundings() -> dict[str, Any]:
    """What a call finds around it."""
    from django.contrib.auth.models import User
    from django.utils import timezone, translation

    from tests.context_jobs import request_id

    return {
        "in_worker": in_worker(),
        "language": translation.get_language(),
        "zone": timezone.get_current_timezone_name(),
        "model": User._meta.label,
        "request_id": request_id.get("none"),
        # The process of Dask's that the fork server of this worker belongs to.
        "dask": parent(os.getppid()),
    }


def parent(pid: int) -> int:
    """Who has started it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_host() -> NoReturn:
    """End the process of Dask's that this worker belongs to."""
    os.kill(parent(os.getppid()), signal.SIGKILL)
    wait_until(lambda: False, timeout=20)
    raise AssertionError


def take_long(seconds: float) -> None:
    """An initializer."""
    time.sleep(seconds)


def begin(path: Path, _: bytes) -> None:
    """Say so, and go on."""
    announce(path, str(os.getpid()))
    time.sleep(20)


def start_once(path: Path) -> None:
    """An initializer that refuses the second time."""
    if path.exists():
        raise RuntimeError("only once")
    path.touch()


def refuse_in(dask_process: int) -> None:
    """An initializer."""
    if surroundings_of_host() == dask_process:
        raise RuntimeError("not here")


def surroundings_of_host() -> int:
    """The process of Dask's that this worker belongs to."""
    return parent(os.getppid())
