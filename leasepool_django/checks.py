"""The system checks: every mistake in ``settings.LEASEPOOL``, and warnings about deployments.

``conf.ProblemId`` is the table of ids. ``apps`` registers both functions; ``check_deployment``
runs with ``manage.py check --deploy`` only.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core import checks
from django.utils.module_loading import import_string

from .backends.base import resolve
from .conf import SETTING, AliasConfig, Problem, ProblemId, validate
from .cores import usable_cores
from .engine import LeasedExecutorManager
from .exceptions import UnsupportedBackendError

__all__ = ["check_deployment", "check_settings"]

Messages = list[checks.CheckMessage]


def check_settings(**_options: Any) -> Messages:
    """Report every mistake in ``settings.LEASEPOOL``, and what will not work as intended."""
    configs, problems = validate()
    for config in configs.values():
        problems.extend(list(_import_problems(config)) or _refusal(config))
        problems.extend(_warnings(config))
    return [_message(problem) for problem in problems]


def check_deployment(**_options: Any) -> Messages:
    """Report what matters where the project is served."""
    configs, _ = validate()
    problems = list(_asgi_problems())
    for config in configs.values():
        problems.extend(_deployment_problems(config))
    return [_message(problem) for problem in problems]


def _message(problem: Problem) -> checks.CheckMessage:
    kind = checks.Warning if ".W" in problem.id else checks.Error
    return kind(problem.message, hint=problem.hint, id=problem.id)


def _import_problems(config: AliasConfig) -> Iterator[Problem]:
    """What a worker could not import.

    The initializer is imported here; preload modules, which may be heavy, are only looked for.
    """
    where = f"{SETTING}[{config.alias!r}]['OPTIONS']"
    initializer = config.options.get("initializer")
    if isinstance(initializer, str):
        try:
            initializer = import_string(initializer)
        except Exception as error:  # noqa: BLE001 - the module is the user's, and may raise anything
            yield Problem(
                ProblemId.BAD_INITIALIZER,
                f"{where}['initializer'] = {initializer!r} cannot be imported: "
                f"{type(error).__name__}: {error}.",
                "It is the dotted path of a function that each worker calls once.",
            )
            initializer = None
    if initializer is not None and not callable(initializer):
        yield Problem(
            ProblemId.BAD_INITIALIZER,
            f"{where}['initializer'] = {config.options['initializer']!r} is not callable.",
            "It is the dotted path of a function that each worker calls once.",
        )
    preload = config.options.get("preload", ())
    if isinstance(preload, str) or not isinstance(preload, Sequence):
        yield Problem(
            ProblemId.BAD_PRELOAD,
            f"{where}['preload'] must be a list of modules, not {preload!r}.",
            "For example ['shop.scoring'].",
        )
        return
    for name in preload:
        reason = _why_not_importable(name)
        if reason:
            yield Problem(
                ProblemId.BAD_PRELOAD,
                f"{where}['preload'] names {name!r}, which cannot be imported: {reason}.",
                "It lists dotted modules that are imported once, before workers are forked.",
            )


def _why_not_importable(name: object) -> str | None:
    if not isinstance(name, str):
        return f"it is of type {type(name).__name__}, not a string"
    try:
        found = importlib.util.find_spec(name) is not None
    except Exception as error:  # noqa: BLE001 - the packages it is in are the user's
        return f"{type(error).__name__}: {error}"
    return None if found else "there is no such module"


def _refusal(config: AliasConfig) -> Iterator[Problem]:
    """What the engine or the backend refuses when the manager is made; making it starts nothing."""
    try:
        LeasedExecutorManager(**config.manager_kwargs())
    except Exception as error:  # noqa: BLE001 - a backend may be the user's, and raise anything
        expected = isinstance(error, (TypeError, ValueError, UnsupportedBackendError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        yield Problem(
            ProblemId.REFUSED_BY_BACKEND,
            f"{SETTING}[{config.alias!r}] is refused by the backend {config.backend!r}: {text}",
            "Correct the value; the pool cannot start with it.",
        )


def _warnings(config: AliasConfig) -> Iterator[Problem]:
    where = f"{SETTING}[{config.alias!r}]"
    cores = usable_cores()
    workers = _most_workers(config)
    if workers > cores and resolve(config.backend).supports_isolation:
        yield Problem(
            ProblemId.TOO_MANY_WORKERS,
            f"{where} allows {workers} worker processes (MAX_POOLS {config.max_pools} x "
            f"WORKERS_PER_POOL {config.workers_per_pool}), but this process may use {cores} "
            f"core{'' if cores == 1 else 's'} here.",
            "More busy workers than cores slow each other and the server down. CPU affinity and "
            "the quota of the control group count.",
        )
    if (
        _is_standard_process_pool(config)
        and config.options.get("max_tasks_per_child") is not None
        and _recycling_deadlocks()
    ):
        yield Problem(
            ProblemId.RECYCLING_DEADLOCKS,
            f"{where} recycles workers of concurrent.futures.ProcessPoolExecutor "
            f"(max_tasks_per_child = {config.options['max_tasks_per_child']!r}), which can "
            "deadlock on this Python.",
            "Leave max_tasks_per_child out, use a Python with the fix "
            "(https://github.com/python/cpython/issues/115634), or BACKEND 'process'.",
        )


def _most_workers(config: AliasConfig) -> int:
    return config.max_pools * config.workers_per_pool


def _is_standard_process_pool(config: AliasConfig) -> bool:
    backend: object = config.backend
    if isinstance(backend, str) and "." in backend:
        backend = import_string(backend)
    return isinstance(backend, type) and issubclass(backend, ProcessPoolExecutor)


def _recycling_deadlocks() -> bool:
    """Whether this Python lacks the fix, which came late in the life of 3.13 and 3.14.

    It is recognized by the method it added: https://github.com/python/cpython/pull/140900
    """
    return not hasattr(ProcessPoolExecutor, "_replace_dead_worker")


def _asgi_problems() -> Iterator[Problem]:
    path = getattr(settings, "ASGI_APPLICATION", None)
    if isinstance(path, str) and _mentions_lifespan(path.rpartition(".")[0]) is False:
        yield Problem(
            ProblemId.ASGI_NOT_WRAPPED,
            f"The ASGI application {path!r} is not wrapped in LeasePoolLifespan.",
            "Without it pools start at the first request and are not drained at the end: "
            "application = LeasePoolLifespan(get_asgi_application()), from leasepool_django.asgi.",
        )


def _mentions_lifespan(module: str) -> bool | None:
    """Whether the module's source names ``LeasePoolLifespan``; ``None`` if it cannot be read.

    It is read and not imported: importing it would load the whole application.
    """
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return None
        tree = ast.parse(Path(spec.origin).read_bytes())
    except Exception:  # noqa: BLE001 - whatever is wrong with it is not this check's business
        return None
    names = {
        getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        for node in ast.walk(tree)
    }
    return "LeasePoolLifespan" in names


def _deployment_problems(config: AliasConfig) -> Iterator[Problem]:
    backend = resolve(config.backend)
    where = f"{SETTING}[{config.alias!r}]"
    cores = usable_cores()
    if (
        cores == 1
        and getattr(settings, "ASGI_APPLICATION", None)
        and "nice" in (backend.option_names() or ())
        and not config.options.get("nice")
        and config.options.get("scheduling", "normal") == "normal"
    ):
        yield Problem(
            ProblemId.NO_NICE_ON_ONE_CORE,
            f"{where} has no 'nice', and server and workers share one core.",
            "OPTIONS['nice'] = 10 lets requests go before the work in the pool.",
        )
    servers = os.environ.get("WEB_CONCURRENCY", "")
    total = _most_workers(config) * int(servers) if servers.isdecimal() else 0
    if total > cores and int(servers) > 1 and backend.supports_isolation:
        yield Problem(
            ProblemId.TOO_MANY_SERVER_PROCESSES,
            f"{where} allows {_most_workers(config)} worker processes for each of the {servers} "
            f"server processes (WEB_CONCURRENCY): {total} on {cores} "
            f"core{'' if cores == 1 else 's'}.",
            "Each server process has its own pools. Lower WORKERS_PER_POOL or WEB_CONCURRENCY.",
        )
