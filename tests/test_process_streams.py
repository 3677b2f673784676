"""Servers whose standard streams are closed, as ``>&-`` and some service managers leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process_pools import run_program

CLOSED = """
    import os
    import sys
    from pathlib import Path

    for number in map(int, sys.argv[3].split()):
        os.close(number)
    # As the interpreter starts with these descriptors closed.
    program = str(Path(__file__).with_name("served.py"))
    os.execv(sys.executable, [sys.executable, program, *sys.argv[1:]])
"""

SERVED = """
import os
import sys
from pathlib import Path

from leasepool_django import LeasedExecutorManager
from tests import process_jobs as jobs

if __name__ == "__main__":
    options = {"mp_context": sys.argv[1]}
    if sys.argv[2] == "django":
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.worker_settings"
        options["hooks"] = "leasepool_django.backends.process.django_worker"
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1, **options)
    manager.start_sync()
    found = manager.run_sync(jobs.descriptors)
    manager.run_sync(jobs.print_text, "printed")
    manager.run_sync(jobs.run_program, "echo printed; echo printed >&2")
    assert manager.run_sync(jobs.echo, bytes(200_000)) == bytes(200_000)
    manager.stop_sync()
    text = " ".join(found[int(number)] for number in sys.argv[3].split())
    Path(sys.argv[4]).write_text(text)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("hooks", ["plain", "django"])
@pytest.mark.parametrize("closed", ["1", "2", "1 2", "0 1 2"])
def test_workers_start_where_streams_are_closed(
    method: str, hooks: str, closed: str, tmp_path: Path
) -> None:
    """No socket has such a number in a worker, where a program would print into it."""
    (tmp_path / "served.py").write_text(SERVED)
    answer = tmp_path / "answer"
    ended = run_program(tmp_path, CLOSED, method, hooks, closed, answer)
    assert answer.exists(), ended.stderr
    assert set(answer.read_text().split()) == {"/dev/null"}
