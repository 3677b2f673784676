"""A PostgreSQL server of the tests' own: in a folder, on a Unix socket, reachable by nobody else.

Skips where the server's programs or its driver are missing.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until

__all__ = ["Server", "new_server"]

# Where Debian and its kin keep what is not for everybody's PATH.
DEBIAN = Path("/usr/lib/postgresql")
# Names the socket in the folder; nothing listens on the network.
PORT = 5432


class Server:
    """A database cluster in ``folder``, which a server of ``user`` serves when it is started."""

    def __init__(self, programs: Path, folder: Path, user: str) -> None:
        self._programs = programs
        self._folder = folder
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make an empty cluster."""
        subprocess.run(
            [self._programs / "initdb", "-D", self._folder / "data", "-U", "shop", "-A", "trust",
             "-E", "UTF8", "--locale=C", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            **self._identity(),
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        # The server refuses to run as root.
        if self._user == getpass.getuser():
            return {}
        group = pwd.getpwnam(self._user).pw_gid
        return {"user": self._user, "group": group, "extra_groups": []}

    def start(self) -> None:
        """Start, and return when it takes connections."""
        log = self._folder / "log"
        options = {"unix_socket_directories": self._folder, "listen_addresses": "", "fsync": "off",
                   "port": PORT}  # fmt: skip
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data",
                 *(f"--{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                **self._identity(),
            )  # fmt: skip
        wait_until(self._answers, timeout=30, message=log.read_text)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(
                host=str(self._folder), port=PORT, user="shop", dbname="postgres"
            ).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End all connections and the server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def settings(self, **more: Any) -> dict[str, Any]:
        """What Django's ``DATABASES`` has to say about it."""
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "USER": "shop",
            "HOST": str(self._folder),
            "PORT": PORT,
            **more,
        }


@contextmanager
def new_server() -> Iterator[Server]:
    """Give a server that is not started yet; or skip the test with the reason."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    programs = _programs()
    user = getpass.getuser()
    if os.getuid() == 0:
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
    # Not below pytest's own folder, into which another user cannot look.
    with tempfile.TemporaryDirectory(prefix="leasepool-tests-postgres-") as name:
        folder = Path(name)
        if os.getuid() == 0:
            shutil.chown(folder, user)
        server = Server(programs, folder, user)
        server.create()
        try:
            yield server
        finally:
            server.stop()


def _programs() -> Path:
    found = shutil.which("initdb")
    if found is not None and shutil.which("postgres"):
        return Path(found).parent
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not versions:
        pytest.skip("the programs of a PostgreSQL server are not installed")
    return versions[-1].parent
