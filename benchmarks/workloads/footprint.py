"""What importing a contender adds to a Django process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import ClassVar

from ..contenders import CONTENDERS, Contender, Entry
from ..measuring import NO_LOOP, Effort, Metric, NotMeasuredError
from ..reasons import of_output
from ..weigh import MODULES
from .group import PEERS, Figures, Group


class Footprint(Group):
    """Import time and memory, in a process that has Django's ASGI side loaded already."""

    name = "footprint"
    title = "Import time and memory added to a Django process"
    work = (
        "A new process sets Django up and makes its ASGI application; then what a project uses of "
        "the contender is imported, with no worker started. For this package that is the "
        "application in `INSTALLED_APPS`, the lifespan wrapper and what `views.py` imports. Import "
        "is the time of that, memory what it adds to the private memory of the process. For this "
        "package the memory is taken a second time after the first call, with the default pool "
        "running, one worker for each core: what the server's process has grown by since before "
        "the import, its workers not counted. The goal is about what importing adds. Five times, "
        "each in a new process, of which the median counts."
    )
    metrics = (
        Metric("import", "import", "ms"),
        Metric("memory", "memory", "MB"),
        Metric("running", "memory with workers running", "MB"),
    )
    contenders: ClassVar[tuple[str, ...]] = ("django", *PEERS)
    quick = ("django",)
    loops = (NO_LOOP,)
    processes = 5  # each can import only once

    def refusal(self, entry: Entry) -> str | None:
        return None

    def cell(self, contender: str, loop: str, effort: Effort) -> Figures:
        # In a process that has imported nothing of the harness: shared imports would be free.
        if contender not in MODULES:
            raise NotMeasuredError(f"nothing is known to import for {CONTENDERS[contender].title}")
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.weigh", contender],
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )
        if answer.returncode:
            raise NotMeasuredError(
                of_output(answer.stderr) or f"ended with status {answer.returncode}"
            )
        figures: Figures = json.loads(answer.stdout)
        return figures

    async def measure(self, contender: Contender, effort: Effort) -> Figures:
        raise NotImplementedError("imports are measured in a process of their own")


GROUPS = (Footprint(),)
