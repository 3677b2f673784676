"""The system checks: every mistake in ``settings.LEASEPOOL``, and warnings about deployments.

``conf.ProblemId`` is the table of ids. ``apps`` registers both functions; ``check_deployment``
runs with ``manage.py check --deploy`` only.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from django.conf import settings
from django.core import checks
from django.utils.module_loading import import_string

from .asgi_source import LIFESPAN, spec_of, uses_lifespan
from .backends.base import BUILT_IN, resolve
from .conf import (
    DEFAULT_ALIAS,
    DEFAULT_NICE,
    SETTING,
    AliasConfig,
    Problem,
    ProblemId,
    aliases,
    validate,
)
from .cores import usable_cores
from .engine import LeasedExecutorManager
from .exceptions import UnsupportedBackendError

__all__ = ["check_deployment", "check_settings"]

Messages = list[checks.CheckMessage]

# By calling what is one of these.
_BODY_IS_NOT_RUN = (
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
)


def check_settings(**_options: Any) -> Messages:
    """Report every mistake in ``settings.LEASEPOOL``, and what will not work as intended."""
    configs, problems = validate()
    for config in validate(mend=True)[0].values():
        not_found = list(_import_problems(config))
        problems.extend(not_found)
        if not not_found:
            problems.extend(_refusals(config))
        elif config.backend in BUILT_IN:
            problems.extend(_refusals(_without(config, {problem.id for problem in not_found})))
    for config in configs.values():
        problems.extend(_standard_pool_problems(config))
    problems.extend(_too_many_workers(configs.values()))
    names = aliases()
    if names and DEFAULT_ALIAS not in names:
        problems.append(
            Problem(
                ProblemId.NO_DEFAULT_ALIAS,
                f"{SETTING} has no alias {DEFAULT_ALIAS!r}, only {', '.join(map(repr, names))}.",
                "run_in_pool, and with_lease, offload and the command leasepool without a pool, "
                "use it: give one alias this name, or always name a pool.",
            )
        )
    return [_message(problem) for problem in problems]


def check_deployment(**_options: Any) -> Messages:
    """Report what matters where the project is served."""
    configs, _ = validate()
    problems = [*_asgi_problems(), *_deployment_problems(configs.values())]
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
    elif config.backend in BUILT_IN and any(
        is_one_of(function)
        for function in (initializer, getattr(type(initializer), "__call__", None))  # noqa: B004
        for is_one_of in _BODY_IS_NOT_RUN
    ):
        yield Problem(
            ProblemId.BAD_INITIALIZER,
            f"{where}['initializer'] = {config.options['initializer']!r} is a coroutine or "
            "generator function, whose body would not run.",
            "Name a plain function, which each worker calls once.",
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


def _without(config: AliasConfig, told: set[ProblemId]) -> AliasConfig:
    """``config`` without the options whose mistakes have been told."""
    named = {ProblemId.BAD_INITIALIZER: "initializer", ProblemId.BAD_PRELOAD: "preload"}
    names = {named[problem] for problem in told}
    return config.with_options({k: v for k, v in config.options.items() if k not in names})


def _refusals(config: AliasConfig) -> Iterator[Problem]:
    """What the engine or the backend refuses when the manager is made; making it starts nothing.

    Each time only one mistake is told. The built-in backends name the option and judge each by
    itself, so the rest is judged again without it. Other backends may need an option, and are not
    asked again.
    """
    options = dict(config.options)
    text = _why_refused(config)
    while text is not None:
        yield Problem(
            ProblemId.REFUSED_BY_BACKEND,
            f"{SETTING}[{config.alias!r}] is refused by the backend {config.backend!r}: {text}",
            "Correct the value; the pool cannot start with it.",
        )
        for name in options if config.backend in BUILT_IN else ():
            if name not in text:
                continue
            rest = {key: value for key, value in options.items() if key != name}
            without = _why_refused(config.with_options(rest))
            if without != text:
                options, text = rest, without
                break
        else:
            return


def _why_refused(config: AliasConfig) -> str | None:
    try:
        LeasedExecutorManager(**config.manager_kwargs())
    except Exception as error:  # noqa: BLE001 - a backend may be the user's, and raise anything
        expected = isinstance(error, (TypeError, ValueError, UnsupportedBackendError))
        return str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
    return None


def _too_many_workers(configs: Iterable[AliasConfig]) -> Iterator[Problem]:
    isolated = _with_processes(configs)
    workers = sum(map(_most_workers, isolated))
    if workers > usable_cores():
        products = " + ".join(
            f"MAX_POOLS {config.max_pools} x WORKERS_PER_POOL {config.workers_per_pool}"
            for config in isolated
        )
        yield Problem(
            ProblemId.TOO_MANY_WORKERS,
            f"{_allowing(isolated)} {workers} worker processes ({products}), but this process may "
            f"use {_cores()} here.",
            "More busy workers than cores slow each other and the server down. CPU affinity and "
            "the quota of the control group count.",
        )


def _with_processes(configs: Iterable[AliasConfig]) -> list[AliasConfig]:
    backends = [(config, resolve(config.backend)) for config in configs]
    return [
        config
        for config, backend in backends
        if backend.supports_isolation and backend.on_this_machine
    ]


def _allowing(configs: Sequence[AliasConfig]) -> str:
    """The beginning of a sentence about the workers of all these aliases."""
    *others, last = (f"{SETTING}[{config.alias!r}]" for config in configs)
    return f"{', '.join(others)} and {last} together allow" if others else f"{last} allows"


def _cores() -> str:
    cores = usable_cores()
    return f"{cores} core{'' if cores == 1 else 's'}"


def _most_workers(config: AliasConfig) -> int:
    return config.max_pools * config.workers_per_pool


def _standard_pool_problems(config: AliasConfig) -> Iterator[Problem]:
    """What is to be known about ``concurrent.futures.ProcessPoolExecutor`` and its subclasses."""
    backend = resolve(config.backend)
    executor_class = getattr(backend, "executor_class", None)
    if executor_class is None or not issubclass(executor_class, ProcessPoolExecutor):
        return
    where = f"{SETTING}[{config.alias!r}]"
    recycling = config.options.get("max_tasks_per_child")
    if recycling is not None and _recycling_deadlocks():
        yield Problem(
            ProblemId.RECYCLING_DEADLOCKS,
            f"{where} recycles workers of concurrent.futures.ProcessPoolExecutor "
            f"(max_tasks_per_child = {recycling!r}), which can deadlock on this Python.",
            "Leave max_tasks_per_child out, use a Python with the fix "
            "(https://github.com/python/cpython/issues/115634), or BACKEND 'process'.",
        )
    # A class that recycles workers spawns them unless told otherwise.
    known = backend.option_names()
    takes_context = known is None or "mp_context" in known
    chosen = config.options.get("mp_context") is not None or recycling is not None
    if takes_context and not chosen and _default_start_method() == "fork":
        yield Problem(
            ProblemId.FORKS_THE_SERVER,
            f"{where} has workers of {backend.name}, which are forked from this process unless "
            "OPTIONS has 'mp_context'.",
            "Forking a server with threads copies its locks, sockets and database connections. "
            "OPTIONS['mp_context'] = 'forkserver' or 'spawn', with an initializer that calls "
            "django.setup(), or BACKEND 'process'.",
        )


def _default_start_method() -> str:
    """How ``multiprocessing`` starts processes here unless told; asking does not settle it."""
    chosen: str | None = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _recycling_deadlocks() -> bool:
    """Whether this Python lacks the fix, which came late in the life of 3.13 and 3.14.

    It is recognized by the method it added: https://github.com/python/cpython/pull/140900
    """
    return not hasattr(ProcessPoolExecutor, "_replace_dead_worker")


def _asgi_problems() -> Iterator[Problem]:
    module, name = _asgi_application()
    if module is not None and uses_lifespan(module, name) is False:
        yield Problem(
            ProblemId.ASGI_NOT_WRAPPED,
            f"{module} does not use {LIFESPAN}.",
            "Without it pools start at the first request that needs them, and an ASGI server does "
            f"not drain them at the end: application = {LIFESPAN}(get_asgi_application()), from "
            "leasepool_django.asgi. Under WSGI servers it has no effect.",
        )


def _asgi_application() -> tuple[str | None, str]:
    """Module and name of the ASGI application; no module if there seems to be none.

    Where ``ASGI_APPLICATION`` does not say it, the module is beside those of ``WSGI_APPLICATION``
    or ``ROOT_URLCONF``, as ``startproject`` has it.
    """
    path = getattr(settings, "ASGI_APPLICATION", None)
    if isinstance(path, str):
        module, _, name = path.rpartition(".")
        return module, name
    for setting, depth in (("WSGI_APPLICATION", 2), ("ROOT_URLCONF", 1)):
        path = getattr(settings, setting, None)
        package, *below = path.rsplit(".", depth) if isinstance(path, str) else ("",)
        if len(below) == depth and spec_of(f"{package}.asgi") is not None:
            return f"{package}.asgi", "application"
    return None, ""


def _deployment_problems(configs: Iterable[AliasConfig]) -> Iterator[Problem]:
    configs = list(configs)
    cores = usable_cores()
    if cores == 1 and _asgi_application()[0] is not None:
        for config in configs:
            if (
                "nice" in (resolve(config.backend).option_names() or ())
                and not config.options.get("nice", DEFAULT_NICE)
                and config.options.get("scheduling", "normal") == "normal"
            ):
                yield Problem(
                    ProblemId.NO_NICE_ON_ONE_CORE,
                    f"{SETTING}[{config.alias!r}] has 'nice' 0, and server and workers share one "
                    "core.",
                    f"The default, {DEFAULT_NICE}, lets requests go before the work in the pool.",
                )
    isolated = _with_processes(configs)
    workers = sum(map(_most_workers, isolated))
    servers = os.environ.get("WEB_CONCURRENCY", "")
    total = workers * int(servers) if servers.isdecimal() else 0
    if total > cores and int(servers) > 1:
        yield Problem(
            ProblemId.TOO_MANY_SERVER_PROCESSES,
            f"{_allowing(isolated)} {workers} worker processes for each of the {servers} server "
            f"processes (WEB_CONCURRENCY): {total} on {_cores()}.",
            "Each server process has its own pools. Lower WORKERS_PER_POOL or WEB_CONCURRENCY.",
        )
