"""Projects that ``manage.py leasepool status`` shows, and processes that claim to be of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leasepool_django import status
from leasepool_django.status import Answer, ask_all
from tests.process_pools import ALL_WARNINGS, ROOT
from tests.waiting import wait_until

__all__ = ["Project", "new_project", "saying"]

SERVER = """
    import asyncio, os, pathlib, sys
    import django
    from leasepool_django import pools, run_in_pool
    from tests.process_jobs import hold

    async def main(folder):
        async with pools["default"].lease(owner="two\\nlines", workers=1) as lease:
            calls = [lease.run(hold, folder, "first"), lease.run(hold, folder, "second")]
            waiting = asyncio.create_task(run_in_pool(hold, folder, "third"))
            await asyncio.gather(*calls)
        await waiting

    if __name__ == "__main__":
        django.setup()
        asyncio.run(main(pathlib.Path(sys.argv[1])))
        print("served")
"""


@dataclass
class Project:
    """A project of its own, so that no other test's processes are seen."""

    folder: Path
    settings: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **ALL_WARNINGS,
            "DJANGO_SETTINGS_MODULE": self.settings,
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "manage.py"), "leasepool", "status", *arguments]

    def status(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd=options.pop("cwd", self.folder),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    def answer(self) -> Answer:
        (answer,) = ask_all(self.settings)
        return answer

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        """A process with a lease, one call that runs, one that waits in the lease, one in line."""
        script = self.folder / "server.py"
        script.write_text("\n".join(line[4:] for line in SERVER.splitlines()))
        with subprocess.Popen(
            [sys.executable, str(script), str(self.folder)],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_until((self.folder / "first").exists, timeout=20)
                wait_until(lambda: self.answer().pools["default"].waiting)
                yield process
            finally:
                process.kill()


def new_project(tmp_path: Path) -> Project:
    name = f"settings_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(
        "from tests.settings import *\n"
        "LEASEPOOL = {'default': {'WORKERS_PER_POOL': 1}, 'reports': {'WORKERS_PER_POOL': 1},\n"
        "             'secret': {'WORKERS_PER_POOL': 1, 'PUBLISH_STATUS': False}}\n"
        "SILENCED_SYSTEM_CHECKS = ['leasepool.W001']\n"
    )
    return Project(tmp_path, name)


@contextmanager
def saying(project: Project, text: str) -> Iterator[None]:
    """A process of this user that says ``text``."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{status._prefix(project.settings)}{'0' * 16}")
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(text.encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
