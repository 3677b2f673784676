"""A Dask cluster on this machine, in processes of its own: ``python -m tests.dask_cluster``.

Dask has every exception of its process pickled in another way from when it is imported, which other
tests must not see; ``test_remote`` holds that it makes no difference.
"""

from __future__ import annotations

import copyreg
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import distributed  # noqa: F401 - first of all, see above

from leasepool_django import LeasedExecutorManager
from tests import managers
from tests.process_pools import ROOT

for _cls, _reducer in list(copyreg.dispatch_table.items()):
    if _reducer.__module__ == "tblib.pickling_support":
        del copyreg.dispatch_table[_cls]

__all__ = ["cluster", "running"]


@contextmanager
def cluster(workers: int, **environment: str) -> Iterator[str]:
    """Give the address of the scheduler of ``workers`` processes with one thread each."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__, str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "", "PYTHONDEVMODE": "", **environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, "the cluster has not started"
            yield address
        finally:
            process.stdin.close()  # which ends it, see below
            process.wait(30)


def running(
    address: str, workers: int = 1, **options: Any
) -> AbstractContextManager[LeasedExecutorManager]:
    """As ``managers.running``, with workers of the cluster at ``address``."""
    return managers.running(workers, backend="dask", address=address, **options)


def _main(workers: str) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=int(workers),
        threads_per_worker=1,
        processes="DASK_TESTS_THREADS" not in os.environ,
        protocol="tcp://",
        dashboard_address=None,
        silence_logs=False,
    ) as local:
        sys.stdout.write(f"{local.scheduler_address}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    _main(*sys.argv[1:])
