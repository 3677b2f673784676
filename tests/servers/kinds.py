"""The servers of the matrix: how each is started, and how it differs from the others.

A difference said here is the server's own doing. The tests expect it, and the table in
``docs/deployment.md`` is made from what they then see.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["KINDS", "Kind", "each_kind"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))


@dataclass(frozen=True)
class Kind:
    """One way to serve Django.

    ``name``: its row in the table, and the command line without application and address.
    ``package``: the distribution it comes from. ``lifespan``: pools start and stop with the server.
    ``processes``: server processes with a pool. ``cancels``: an async view is cancelled when its
    client leaves. ``failed_status``: the exit status, or statuses, when a pool cannot start
    with the server; none where the server stays. ``term_status``: that after SIGTERM. ``on_term``,
    ``on_term_to_all``, ``on_interrupt``: whether a running call still answers its request after
    SIGTERM, SIGTERM to every process at once, Ctrl-C (``None``: it depends). ``notices``: the
    process with the pool gets the signal, so that callers in line hear of it at once. ``hangs``: a
    second signal within moments of the first can hang it for good, with any application. ``slow``:
    a variant of another row.
    """

    name: str
    package: str
    arguments_of: Callable[[str], tuple[str, ...]]
    lifespan: bool = True
    processes: int = 1
    cancels: bool = True
    failed_status: tuple[int, ...] = ()
    term_status: int = 0
    on_term: bool | None = True
    on_term_to_all: bool = True
    on_interrupt: bool | None = True
    notices: bool = True
    hangs: bool = False
    slow: bool = False

    @property
    def asynchronous(self) -> bool:
        """Whether the server speaks ASGI."""
        return self.cancels

    def command(self, *, port: int, folder: Path) -> list[str]:
        """The command line that serves on ``port``; ``folder`` is watched for changes."""
        program, *options = self.name.split()
        start = [sys.executable, str(ROOT / "manage.py")]
        if program != "manage.py":
            start = [str(SCRIPTS / program)]
        if "--reload" in options and program == "uvicorn":
            options += ["--reload-dir", str(folder)]
        return [*start, *options, *self.arguments_of(str(port))]


ASGI = "tests.servers.asgi:application"
WSGI = "tests.servers.wsgi:application"


def uvicorn(port: str) -> tuple[str, ...]:
    return "--port", port, ASGI


def hypercorn(port: str) -> tuple[str, ...]:
    return "--bind", f"127.0.0.1:{port}", ASGI


def granian(port: str) -> tuple[str, ...]:
    return "--port", port, ASGI


def gunicorn_asgi(port: str) -> tuple[str, ...]:
    # The control socket is one file for all of a user's servers.
    return "--no-control-socket", "--bind", f"127.0.0.1:{port}", ASGI


def gunicorn_wsgi(port: str) -> tuple[str, ...]:
    return "--no-control-socket", "--bind", f"127.0.0.1:{port}", WSGI


def daphne(port: str) -> tuple[str, ...]:
    return "--port", port, ASGI


def runserver(port: str) -> tuple[str, ...]:
    return (port,)


KINDS = (
    Kind("uvicorn", "uvicorn", uvicorn, failed_status=(3,), term_status=-15),
    Kind("uvicorn --workers 2", "uvicorn", uvicorn, processes=2, failed_status=(0,)),
    Kind("uvicorn --reload", "uvicorn", uvicorn),
    Kind(
        "hypercorn", "hypercorn", hypercorn, failed_status=(0,), notices=False, on_term_to_all=False
    ),
    Kind("hypercorn -w 0", "hypercorn", hypercorn, failed_status=(1,)),
    Kind("granian --interface asgi", "granian", granian, failed_status=(1,), hangs=True),
    Kind("gunicorn -k asgi", "gunicorn", gunicorn_asgi, failed_status=(3,), on_interrupt=False),
    Kind("gunicorn", "gunicorn", gunicorn_wsgi, lifespan=False, cancels=False, on_interrupt=False),
    Kind(
        "gunicorn --preload",
        "gunicorn",
        gunicorn_wsgi,
        lifespan=False,
        cancels=False,
        on_interrupt=False,
    ),
    Kind(
        "daphne",
        "daphne",
        daphne,
        lifespan=False,
        on_term=False,
        on_term_to_all=False,
        on_interrupt=False,
    ),
    Kind(
        "manage.py runserver",
        "Django",
        runserver,
        lifespan=False,
        cancels=False,
        on_term=False,
        on_term_to_all=False,
        on_interrupt=False,
    ),
    # Variants of the rows above.
    Kind(
        "uvicorn --loop asyncio --http h11",
        "uvicorn",
        uvicorn,
        failed_status=(3,),
        term_status=-15,
        slow=True,
    ),
    Kind(
        "uvicorn --lifespan off",
        "uvicorn",
        uvicorn,
        lifespan=False,
        notices=False,
        term_status=-15,
        slow=True,
    ),
    # When the first of its processes has ended, hypercorn ends the others, busy or not.
    Kind(
        "hypercorn -w 2",
        "hypercorn",
        hypercorn,
        processes=2,
        failed_status=(0, 241),
        on_term=None,
        on_term_to_all=False,
        on_interrupt=None,
        slow=True,
    ),
    Kind(
        "granian --interface asgi --workers 2",
        "granian",
        granian,
        processes=2,
        failed_status=(1,),
        hangs=True,
        slow=True,
    ),
    Kind(
        "gunicorn -k asgi -w 2 --preload",
        "gunicorn",
        gunicorn_asgi,
        processes=2,
        # 1 when both of its processes end at the same moment.
        failed_status=(3, 1),
        on_interrupt=False,
        slow=True,
    ),
    Kind(
        "gunicorn --threads 4",
        "gunicorn",
        gunicorn_wsgi,
        lifespan=False,
        cancels=False,
        slow=True,
    ),
    Kind(
        "manage.py runserver --noreload",
        "Django",
        runserver,
        lifespan=False,
        cancels=False,
        term_status=-15,
        on_term=False,
        on_term_to_all=False,
        on_interrupt=False,
        slow=True,
    ),
)


def each_kind(kind: Callable[[Kind], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Run a test with each of the servers for which ``kind`` is true."""
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.slow else [])
            for each in KINDS
            if kind(each)
        ],
    )
