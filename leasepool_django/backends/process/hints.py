"""What to do instead of sending an object that belongs to one process: advice by its type.

Types are told apart by name, so that nothing needs to be imported (or installed) for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["hint_for"]

_CLIENT = "It holds open connections: create it in the worker, and send it only data"
_DATABASE = (
    "A database connection belongs to the process that opened it: "
    "use django.db inside the function, where each worker has its own"
)
_CACHE = (
    "A cache belongs to its process: use django.core.cache inside the function, where each worker "
    "has its own, or send what was read from it"
)
_HANDLER = "It belongs to its process: import it inside the function"
_REQUEST = (
    "A request belongs to the process that answers it: send the data that the function needs of "
    "it, such as request.GET.dict(), request.body or request.user.pk"
)
_FILE = "An open file belongs to its process: send its path or its contents"
_UPLOAD = "Send what was uploaded (its read()) or the path of its temporary file"
_LOCK = "A lock works in one process only: leave it out, or make it in the worker"
_SOCKET = "A socket belongs to its process: send the address and open it in the worker"
_PENDING = "Await it first, and send what it gives"

# Types that hold others: of the way to the culprit the first that is here gives the advice.
_HOLDERS = {
    "django.http.request.HttpRequest": _REQUEST,
    "rest_framework.request.Request": _REQUEST,
    "django.core.files.uploadedfile.UploadedFile": _UPLOAD,
    "django.core.files.base.File": _FILE,
    "tempfile._TemporaryFileWrapper": _FILE,
    "django.db.backends.base.base.BaseDatabaseWrapper": _DATABASE,
    "django.db.utils.ConnectionHandler": _DATABASE,
    "django.core.cache.CacheHandler": _CACHE,
    "django.core.cache.backends.base.BaseCache": _CACHE,
    "django.utils.connection.BaseConnectionHandler": _HANDLER,
    "asyncio.events.AbstractEventLoop": "An event loop belongs to its process",
    "_asyncio.Future": _PENDING,
    "asyncio.futures.Future": _PENDING,
    "concurrent.futures._base.Future": _PENDING,
    "ssl.SSLSocket": _SOCKET,
    "socket.socket": _SOCKET,
}

# Packages whose objects are connections, or hold them.
_CLIENT_PACKAGES = frozenset(
    {"redis", "valkey", "pymongo", "motor", "elasticsearch", "kafka", "pika", "paramiko", "grpc"}
    | {"requests", "httpx", "aiohttp", "urllib3", "botocore", "boto3"}
)
_DATABASE_PACKAGES = frozenset(
    {"sqlite3", "psycopg", "psycopg_pool", "psycopg2", "MySQLdb", "pymysql", "asyncpg", "oracledb"}
)

# Types of the culprit itself.
_CULPRITS = {
    "_thread.lock": _LOCK,
    "_thread.RLock": _LOCK,
    "multiprocessing.synchronize.SemLock": _LOCK,
    "_socket.socket": _SOCKET,
    "_io._IOBase": _FILE,
    "generator": "Send a list of what it yields: list(...)",
    "async_generator": "Send a list of what it yields",
    "coroutine": _PENDING,
    "dict_keys": "Send a list: list(...)",
    "dict_values": "Send a list: list(...)",
    "dict_items": "Send a list: list(...)",
    "mappingproxy": "Send a dict: dict(...)",
    "memoryview": "It was released, or its format or shape cannot be made again in a worker: send "
    "bytes, such as its tobytes()",
    "frame": "Send text: traceback.format_exc()",
    "traceback": "Send text: traceback.format_exc()",
    "weakref.ReferenceType": "Send the object itself",
    "_contextvars.ContextVar": "Send its value: .get()",
    "_contextvars.Context": "Send the values that the function needs",
    "_thread._local": "Send the values that the function needs",
}


# What pickling the culprit raised.
_ERRORS = {
    "django.core.exceptions.SynchronousOnlyOperation": (
        "It would ask the database, for which an event loop must not wait. Evaluate it first: "
        "await request.auser(), [x async for x in queryset]; or send the primary key"
    ),
}


def hint_for(trail: Sequence[object], error: BaseException) -> str | None:
    """Give advice, a sentence without its full stop; ``trail`` ends with the culprit.

    ``error``: what pickling the culprit raised. Runs no code of the objects.
    """
    if hint := _first(error, _ERRORS):
        return hint
    for value in trail:
        if hint := _holder_hint(value):
            return hint
    culprit = trail[-1]
    kind = type(culprit)
    if issubclass(kind, ModuleType):
        return "Import the module inside the function"
    if issubclass(kind, FunctionType | type):
        defined: Any = culprit
        return _defined(defined.__qualname__, "It") or _lost(defined, "It")
    return (
        _first(culprit, _CULPRITS)
        or _defined(kind.__qualname__, "Its class")
        or _lost(kind, "Its class")
    )


def _holder_hint(value: object) -> str | None:
    packages = {_name_of(cls).partition(".")[0] for cls in type(value).__mro__}
    if packages & _CLIENT_PACKAGES:
        return _CLIENT
    if packages & _DATABASE_PACKAGES:
        return _DATABASE
    if _name_of(type(value)) == "django.utils.connection.ConnectionProxy":
        # Its own attributes, and not those of what it stands for.
        value = object.__getattribute__(value, "__dict__").get("_connections")
    return _first(value, _HOLDERS)


def _first(value: object, hints: dict[str, str]) -> str | None:
    for cls in type(value).__mro__:
        if hint := hints.get(_name_of(cls)):
            return hint
    return None


def _name_of(cls: type) -> str:
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


def _defined(qualname: str, subject: str) -> str | None:
    if "<lambda>" in qualname:
        return f"{subject} is a lambda: define a function at the top level of a module"
    if "<locals>" in qualname:
        return f"{subject} is defined inside a function: move it to the top level of a module"
    return None


def _lost(defined: FunctionType | type, subject: str) -> str | None:
    found: object = sys.modules.get(defined.__module__)
    for name in defined.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is defined:
        return None
    return (
        f"{subject} is not in the module {defined.__module__}, where a worker looks for it, as when"
        " it was made in an interactive session: move it to a module"
    )
