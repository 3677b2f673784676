"""The options of the ``process`` backend, checked and brought into the form that travels."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

from ...engine.config import log_level, positive_int
from ...exceptions import UnsupportedBackendError
from . import pickling
from .culprit import Part, blame
from .preparation import Setup
from .shared import AVAILABLE

if TYPE_CHECKING:
    from ...engine.config import ManagerConfig

__all__ = ["OPTIONS", "make_setup", "max_shared_bytes"]

DEFAULT_SHARED_BYTES = 1 << 29
HOOKS = ("capture", "prepare", "enter", "leave")  # what every hooks module has

OPTIONS = frozenset(
    {
        "context",
        "hooks",
        "initargs",
        "initializer",
        "max_rss_per_child",
        "max_shared_bytes",
        "max_tasks_per_child",
        "mp_context",
        "nice",
        "preload",
        "scheduling",
        "start_timeout",
    }
)


def make_setup(config: ManagerConfig, options: Mapping[str, Any]) -> Setup:
    """Check the options and bring them into the form that travels."""
    initializer = options.get("initializer")
    initargs = options.get("initargs", ())
    if not isinstance(initargs, (tuple, list)):
        # Without the value, which may be secret.
        raise TypeError(f"initargs must be a tuple or list, not {type(initargs).__name__}.")
    if initializer is not None and not isinstance(initializer, str):
        if not callable(initializer):
            raise TypeError(f"initializer must be callable or a dotted path, not {initializer!r}.")
        pickling.reference(initializer)
        initializer = _pickled("initializer", initializer)
    elif isinstance(initializer, str) and "." not in initializer:
        raise ValueError(f"initializer must be a dotted path, not {initializer!r}.")
    for name in ("max_tasks_per_child", "max_rss_per_child"):
        if options.get(name) is not None:
            positive_int(name, options[name])
    nice = options.get("nice")
    if nice is not None and type(nice) is not int:
        raise TypeError(f"nice must be an integer, not {nice!r}.")
    if nice is not None and not 0 <= nice <= 19:
        raise ValueError(f"nice must be from 0 to 19, not {nice!r}.")
    scheduling = options.get("scheduling")
    if scheduling not in (None, "normal", "idle"):
        raise ValueError(f"scheduling must be 'normal' or 'idle', not {scheduling!r}.")
    if scheduling == "idle" and not hasattr(os, "SCHED_IDLE"):
        raise UnsupportedBackendError("scheduling='idle' exists only on Linux; use nice=19.")
    logs = config.process_logging
    return Setup(
        name=config.name_prefix,
        spawn=_start_method(options.get("mp_context")) == "spawn",
        hooks=checked_hooks(options),
        preload=checked_paths("preload", options),
        context=checked_paths("context", options),
        initializer=initializer,
        initargs=_pickled("initargs", tuple(initargs)) if initargs else None,
        max_tasks=options.get("max_tasks_per_child"),
        max_rss=options.get("max_rss_per_child"),
        max_shared=max_shared_bytes(options),
        nice=nice,
        scheduling=scheduling,
        log_level=log_level("process_log_level", logs.level) if logs.enabled else None,
        clear_log_handlers=logs.clear_child_handlers,
    )


def checked_paths(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The option ``name``, a list of dotted paths."""
    paths = options.get(name, ())
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise TypeError(f"{name} must be a list of dotted paths, not {paths!r}.")
    return tuple(paths)


def checked_hooks(options: Mapping[str, Any]) -> str | None:
    """The option ``hooks``, the dotted path of a module with the functions ``HOOKS``."""
    name = options.get("hooks")
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"hooks must be the dotted path of a module, not {name!r}.")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # the module is the user's, and may raise anything
        raise ValueError(
            f"hooks must be the dotted path of a module, and {name!r} cannot be imported: "
            f"{type(error).__name__}: {error}."
        ) from error
    missing = [function for function in HOOKS if not callable(getattr(module, function, None))]
    if missing:
        raise ValueError(f"hooks names {name!r}, which has no {missing[0]}().")
    return name


def _pickled(name: str, value: Any) -> bytes:
    try:
        return pickle.dumps(value, 5)
    except Exception as error:
        raise blame(
            error, [Part(name, value)], subject=f"{name} cannot be sent to workers"
        ) from error


def max_shared_bytes(options: Mapping[str, Any]) -> int:
    """Check the option; 0 where there is no shared memory, or none is wanted."""
    value = options.get("max_shared_bytes", DEFAULT_SHARED_BYTES)
    if value == 0 and type(value) is int:
        return 0
    if type(value) is int and value < 0:
        raise ValueError(f"max_shared_bytes must be at least 0, not {value}.")
    return positive_int("max_shared_bytes", value) if AVAILABLE else 0


def _start_method(context: Any) -> str:
    if context is None:
        return "spawn" if sys.platform == "darwin" else "forkserver"
    method = context.get_start_method() if isinstance(context, BaseContext) else context
    if method == "fork":
        raise UnsupportedBackendError(
            "mp_context='fork' is refused: forking a running server copies its locks, listening "
            "sockets, signal handling and database connections into the worker. Use 'forkserver', "
            "and preload for modules whose memory is to be shared."
        )
    if method not in ("forkserver", "spawn"):
        raise ValueError(f"mp_context must be 'forkserver' or 'spawn', not {context!r}.")
    return str(method)
