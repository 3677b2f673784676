"""What a worker is told before its first call, and the bootstrap of processes started by exec.

Standard library only; the parent fills it in, the fork server and every worker read it.
"""

# Every worker imports this module, and pathlib only for it:
# ruff: noqa: PTH100, PTH113
from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

__all__ = [
    "Setup",
    "boot_command",
    "flush_streams",
    "initialize",
    "main_module",
    "prepare",
    "rare_collections",
]

# Importing leaves next to no garbage, and to look for it, in all that was imported before, takes a
# twentieth of the time. There are 50,000 such objects when Django is set up.
OBJECTS_BETWEEN_COLLECTIONS = 200_000

# Run by `python -c` in a process started by exec: sys.path must be the parent's before anything
# of this package can be imported. argv: a descriptor to read the path from, module, arguments.
BOOT = (
    "import importlib, marshal, os, sys; "
    "source = open(int(sys.argv[1]), 'rb'); "
    "sys.path[:] = marshal.load(source); "
    "importlib.import_module(sys.argv[2]).main(source, *sys.argv[3:])"
)


# What the decorators of contextlib make: they hide a generator.
_MANAGERS = (
    contextlib._GeneratorContextManager,  # private: nothing else says what is a manager's alone
    contextlib._AsyncGeneratorContextManager,  # private: as above
)


class Setup(NamedTuple):
    """Everything about the workers of one manager that does not change. Pickled once.

    ``main``: how to import the parent's main module again, see ``main_module``; ``tests``: what a
    test run has replaced in the parent, for the hooks' ``follow_tests``; ``initializer``
    is ``None``, a dotted path, or a pickled callable; ``log_level`` is ``None`` without log
    forwarding.
    """

    name: str
    spawn: bool
    argv: tuple[str, ...] = ()
    main: tuple[str, str] | None = None
    hooks: str | None = None
    preload: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    initializer: str | bytes | None = None
    initargs: bytes | None = None
    max_tasks: int | None = None
    max_rss: int | None = None
    max_shared: int = 0
    nice: int | None = None
    scheduling: str | None = None
    log_level: int | None = None
    tests: Any = None
    clear_log_handlers: bool = True


def boot_command(executable: str, source_fd: int, module: str, *arguments: object) -> list[str]:
    """The command that runs ``module.main`` in a fresh interpreter, by way of ``BOOT``.

    ``source_fd``: an inherited descriptor to read the marshalled ``sys.path`` from.
    """
    from subprocess import (  # type: ignore[attr-defined]  # private: no public way to pass -X, -W
        _args_from_interpreter_flags as flags,
    )

    return [executable, *flags(), "-c", BOOT, str(source_fd), module, *map(str, arguments)]


def main_module() -> tuple[str, str] | None:
    """How a worker can import this process's main module: by ``name``, by ``path``, or not.

    ``None`` for an interactive session, ``python -c`` and standard input, and for
    ``python -m package``, whose ``__main__`` has nothing of the user's.
    """
    main = sys.modules["__main__"]
    if main.__name__ == "__mp_main__":
        return None
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        if spec.name == "__main__" or spec.name.endswith(".__main__"):
            return None
        return "name", spec.name
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        return None
    return "path", os.path.abspath(path)


def flush_streams() -> None:
    """Flush standard output and error, as far as they are there and let themselves be flushed.

    A stream is ``None`` where its descriptor was closed at the start (``>&-``), and may have been
    closed or replaced by anything since.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # one of the user's may raise anything
            stream.flush()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let the garbage collector wait while modules are imported. Its thresholds come back."""
    usual = gc.get_threshold()
    rare = (OBJECTS_BETWEEN_COLLECTIONS, *usual[1:])
    gc.set_threshold(*rare)
    try:
        yield
    finally:
        if gc.get_threshold() == rare:  # or a module of the user's has set its own
            gc.set_threshold(*usual)


def prepare(setup: Setup) -> Any:
    """Make this process ready for the user's functions; returns the hooks module or ``None``.

    Imports the main module under the name ``__mp_main__`` (so that a guarded script does not run
    again), then the ``preload`` modules, by way of the hooks' ``prepare`` where there are hooks.
    """
    sys.argv[:] = setup.argv
    if setup.main is not None:
        kind, where = setup.main
        main = types.ModuleType("__mp_main__")
        if kind == "name":
            content = runpy.run_module(where, run_name="__mp_main__", alter_sys=True)
        else:
            content = runpy.run_path(where, run_name="__mp_main__")
        main.__dict__.update(content)
        sys.modules["__main__"] = sys.modules["__mp_main__"] = main

    def preload() -> None:
        for name in setup.preload:
            importlib.import_module(name)

    hooks = None
    if setup.hooks is None:
        preload()
    else:
        hooks = importlib.import_module(setup.hooks)
        hooks.prepare(preload)
    if setup.log_level is not None:
        from .records import forward_logs

        forward_logs(setup.log_level, clear=setup.clear_log_handlers, manager=setup.name)
    return hooks


def initialize(setup: Setup) -> None:
    """Call the user's initializer, if there is one. ``TypeError`` if that does not run its body."""
    if setup.initializer is None:
        return
    initializer: Callable[..., Any]
    if isinstance(setup.initializer, bytes):
        initializer = pickle.loads(setup.initializer)
    else:
        from .remote import resolve

        module, _, name = setup.initializer.rpartition(".")
        initializer = resolve(f"{module}:{name}")
    made = initializer(*(pickle.loads(setup.initargs) if setup.initargs is not None else ()))
    if isinstance(made, _MANAGERS):
        made = made.gen
    match made:
        case types.CoroutineType():
            made.close()  # it will not be awaited
            has_run = False
        case types.GeneratorType():
            begun = made.gi_suspended or made.gi_frame is None
            has_run = begun or made.gi_code not in _bodies(initializer)
        case types.AsyncGeneratorType():
            has_run = made.ag_code not in _bodies(initializer)
        case _:
            has_run = True
    if not has_run:
        raise TypeError(
            "The initializer is a coroutine or generator function, or a context manager made of "
            "one, whose body has not run. Name a plain function."
        )


def _bodies(function: Any) -> Iterator[types.CodeType | None]:
    """The code of ``function``, and of what it wraps."""
    known: set[int] = set()
    while function is not None and id(function) not in known:
        known.add(id(function))
        for one in (function, getattr(type(function), "__call__", None)):  # noqa: B004 - the method
            yield getattr(one, "__code__", None)
        wrapped = getattr(function, "__wrapped__", None)
        function = function.func if isinstance(function, partial) else wrapped
